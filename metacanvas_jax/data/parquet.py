"""Cells of parquet files at random. One column of a row group is read at once; the last are kept.

pyarrow is an extra: it is imported where a file is opened.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from metacanvas_jax.data.columns import TEXTS, find_column
from metacanvas_jax.types import InputError

KEPT = 2**30  # bytes of columns in memory


class Kept:
    """Columns by key, the last ones that were asked for, up to so many bytes (but at least one)."""

    def __init__(self, size: int = KEPT):
        self._limit, self._size, self._lock = size, 0, threading.Lock()
        self._columns: dict[Any, _Column] = {}  # the newest last

    def get(self, key: Any, size: int, read: Callable[[], Any]) -> Any:
        with self._lock:
            column = self._columns.pop(key, None)
            if column is None:
                column = _Column(size)
                self._size += size
            self._columns[key] = column
            while self._size > self._limit and len(self._columns) > 1:
                self._size -= self._columns.pop(next(iter(self._columns))).size
        return column.get(read)


class _Column:
    """Read by the thread that comes first; the others wait for it, those of other columns do not.

    After an error the next one tries again.
    """

    def __init__(self, size: int):
        self.size, self._values, self._lock = size, None, threading.Lock()

    def get(self, read: Callable[[], Any]) -> Any:
        with self._lock:
            if self._values is None:
                self._values = read()
            return self._values


class Parquet:
    """One file; any number of threads may read it."""

    def __init__(self, path: pathlib.Path, kept: Kept):
        self.path, self._kept = path, kept
        try:
            self._arrow = importlib.import_module('pyarrow')
            self._open = importlib.import_module('pyarrow.parquet').ParquetFile
        except ImportError as error:
            raise InputError(
                f"reading {path} needs pyarrow: pip install 'metacanvas-jax[data]'"
            ) from error
        with _reading(path), self._open(path) as file:
            self._metadata, self._schema = file.metadata, file.schema_arrow
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        self.lengths = np.array([group.num_rows for group in groups], np.int64)
        self._ends = np.cumsum(self.lengths)
        if not len(self):
            raise InputError(f'{path} has no rows')

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def column(self, role: str, names: Mapping[str, str | None]) -> str:
        fields = {field.name: field.type for field in self._schema}
        there = {name: str(kind) for name, kind in fields.items()}
        fits = {'caption': self._is_text, 'instruction': self._is_texts}.get(role, self._is_bytes)
        what = 'texts' if role in TEXTS else 'bytes, or of a struct with bytes'
        return find_column(role, names, there, self.path, what, lambda name: fits(fields[name]))

    def _is_bytes(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_struct(kind):
            at = kind.get_field_index('bytes')
            return at >= 0 and self._is_bytes(kind.field(at).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    def _is_text(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_dictionary(kind):
            return self._is_text(kind.value_type)
        return types.is_string(kind) or types.is_large_string(kind)

    def _is_texts(self, kind: Any) -> bool:
        types = self._arrow.types
        is_list = types.is_list(kind) or types.is_large_list(kind)
        return self._is_text(kind.value_type if is_list else kind)

    @functools.cached_property
    def picture_sizes(self) -> np.ndarray | None:
        """(rows, 2): its columns height and width, 0 where they are empty; None without them."""
        names = ['height', 'width']
        types = {field.name: field.type for field in self._schema}
        if not all(name in types and self._arrow.types.is_integer(types[name]) for name in names):
            return None
        with _reading(self.path), self._open(self.path, metadata=self._metadata) as file:
            table = file.read(columns=names)
            return np.stack([table.column(name).fill_null(0).to_numpy() for name in names], 1)

    def sizes(self, column: str) -> np.ndarray:
        """Of a column in each row group, in bytes."""
        return np.array([self._size(group, column) for group in range(len(self.lengths))], np.int64)

    def _size(self, group: int, column: str) -> int:
        found = self._metadata.row_group(group)
        parts = map(found.column, range(found.num_columns))
        return sum(
            part.total_uncompressed_size
            for part in parts
            if f'{part.path_in_schema}.'.startswith(f'{column}.')
        )

    def cell(self, row: int, column: str) -> Any:
        group = int(np.searchsorted(self._ends, row, 'right'))

        def read():
            # Opened each time: no file is shared by threads.
            with self._open(self.path, metadata=self._metadata) as file:
                return file.read_row_group(group, [column], use_threads=False).column(column)

        with _reading(f'{self.path}#{row}'):
            key = (self.path, group, column)
            values = self._kept.get(key, self._size(group, column), read)
            return values[row - int(self._ends[group] - self.lengths[group])].as_py()


@contextlib.contextmanager
def _reading(name: object) -> Iterator[None]:
    """All of pyarrow's errors are one of these."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(f'cannot read {name}: {error}') from error


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A picture, or a text, or a list of texts that say the same; as places.Part is."""

    file: Parquet
    row: int
    column: str

    def open(self) -> BinaryIO:
        value = self._value()
        return io.BytesIO(value['bytes'] if isinstance(value, dict) else value)

    def texts(self) -> list[str]:
        value = self._value()
        return [value] if isinstance(value, str) else [text for text in value if text]

    def _value(self) -> Any:
        value = self.file.cell(self.row, self.column)
        if value is None or (isinstance(value, dict) and value['bytes'] is None):
            raise InputError(f'{self.file.path}#{self.row} has no {self.column}')
        return value
