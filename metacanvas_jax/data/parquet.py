"""Cells of parquet files at random. One column of a row group is read at once; the last are kept.

pyarrow is an extra: it is imported where a file is opened.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from metacanvas_jax.types import InputError

KEPT = 2**30  # bytes of columns in memory

# The names that published sets have them under, in any case; the first one there is taken.
NAMES = {
    'picture': ('image', 'jpg', 'jpeg', 'png', 'webp', 'img', 'picture', 'image_bytes'),
    'caption': ('caption', 'txt', 'text', 'prompt', 'description', 'long_caption'),
}
WANTED = {'picture': 'bytes, or of a struct with bytes', 'caption': 'texts'}


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

    def column(self, kind: str, names: Mapping[str, str | None]) -> str:
        """The name of the column of such a kind: the one that `names` says, else the usual one."""
        given, fits = names.get(kind), {'picture': self._is_picture, 'caption': self._is_text}[kind]
        fields = {field.name: field.type for field in self._schema}
        if given is None:
            found = [name for usual in NAMES[kind] for name in fields if name.lower() == usual]
        else:
            found = [name for name in fields if name == given]
        for name in found:
            if fits(fields[name]):
                return name
        there = ', '.join(f'{name} ({type_})' for name, type_ in fields.items())
        wants = f'no column of {WANTED[kind]}' + (f' named {given!r}' if given is not None else '')
        raise InputError(
            f'{self.path} has {wants} for config.data.columns.{kind}; its columns are: {there}'
        )

    def _is_picture(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_struct(kind):
            at = kind.get_field_index('bytes')
            return at >= 0 and self._is_picture(kind.field(at).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    def _is_text(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_dictionary(kind):
            return self._is_text(kind.value_type)
        return types.is_string(kind) or types.is_large_string(kind)

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
    """Some bytes of a file, as captioned.Part is; a text in UTF-8."""

    file: Parquet
    row: int
    column: str

    def read(self) -> bytes:
        value = self.file.cell(self.row, self.column)
        if isinstance(value, dict):
            value = value['bytes']
        if value is None:
            raise InputError(f'{self.file.path}#{self.row} has no {self.column}')
        return value.encode() if isinstance(value, str) else value
