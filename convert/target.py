"""The Orbax tree of a target, written a layer at a time, and read that way too.

Orbax itself would serialise whole parameters, and one of ours is the same kernel of all layers: of
a 7B model's it has 3.8 GB. So Orbax lays out a tree of placeholders, and its arrays are written
here, in pieces, in the format that it reads: zarr v3, not compressed (weights do not), every piece
with a checksum, for Orbax would not notice a flipped bit by itself.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util

from convert.rules import Shapes
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import PARAMS

# Bytes of a file, so what a device reads at least; a parameter that is smaller as a whole is one.
PIECE = 8 << 20
IN_FLIGHT = 4  # pieces on their way to the disk


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, that becomes `target` at the end: whole or not at all.

    What a killed process left is thrown away; the kernel releases its lock.
    """
    if target.exists():
        raise InputError(f'{target} exists already; remove it, or give another folder')
    partial = target.with_name(f'.{target.name}.partial')
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'cannot write {partial}: {error.strerror}') from error
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError(f'{target} is being written by another process') from error
    except OSError:
        pass  # some network file systems know no locks
    try:
        for old in partial.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_space(folder: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f'{folder.parent} has {free / 1e9:.1f} GB free, want {size / 1e9:.1f} GB')


class Writer:
    """Fills the parameters `shapes`; the arrays lie below `folder`."""

    def __init__(self, folder: pathlib.Path, shapes: Shapes):
        self._folder, self._shapes = folder / PARAMS, shapes
        check_space(folder, sum(a.size * a.dtype.itemsize for a in shapes.values()))
        nothing = np.zeros((), np.uint8)
        placeholders = traverse_util.unflatten_dict(dict.fromkeys(shapes, nothing), sep='/')
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(self._folder.absolute(), ocp.args.PyTreeSave(placeholders))
        self._arrays: dict[str, Any] = {}
        self._writes: collections.deque[Any] = collections.deque()
        self._small: dict[str, np.ndarray] = {}  # parameters waiting for their other layers
        self._left = {path: a.shape[0] if a.ndim else 1 for path, a in shapes.items()}

    def put(self, path: str, index: int | None, value: np.ndarray) -> None:
        """Layer `index` of the parameter, or all of it."""
        want = self._shapes[path]
        self._left[path] -= 1 if index is not None else self._left[path]
        if want.size * want.dtype.itemsize <= PIECE:
            whole = self._small.setdefault(path, np.empty(want.shape, want.dtype))
            whole[... if index is None else index] = value
            if not self._left[path]:
                array = _create(self._folder, path, want, want.shape)
                self._write(array, self._small.pop(path))
            return
        chunk = _chunk(want.shape[0 if index is None else 1 :], want.dtype.itemsize)
        if path not in self._arrays:
            front = () if index is None else (1,)
            self._arrays[path] = _create(self._folder, path, want, (*front, *chunk))
        array = self._arrays[path] if index is None else self._arrays[path][index]
        for row in range(0, len(value), chunk[0]):
            rows = slice(row, min(row + chunk[0], len(value)))
            self._write(array[rows], value[rows].astype(want.dtype, copy=False))

    def _write(self, array: Any, value: np.ndarray) -> None:
        """Returns once `value` is copied: it may be a part of a tensor that is large."""
        written = array.write(value)
        written.commit.force()
        written.copy.result()
        self._writes.append(written.commit)
        if len(self._writes) > IN_FLIGHT:
            self._writes.popleft().result()

    def close(self) -> None:
        """Returns once all is on the disk."""
        while self._writes:
            self._writes.popleft().result()
        left = [path for path, count in self._left.items() if count]
        assert not left, f'not all layers were written: {left}'


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """As many rows as a piece holds."""
    row = int(np.prod(shape[1:])) * itemsize
    return max(1, min(shape[0], PIECE // row)), *shape[1:]


def _create(folder: pathlib.Path, path: str, want: Any, chunk: tuple[int, ...]) -> Any:
    metadata = {
        'shape': list(want.shape),
        'data_type': want.dtype.name,
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': list(chunk)}},
        'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
    }
    # Pieces of zeros are written too: Orbax takes an absent piece for a lost one.
    spec = _spec(folder, path) | {'metadata': metadata, 'store_data_equal_to_fill_value': True}
    return ts.open(spec, create=True, delete_existing=True).result()


def _spec(folder: pathlib.Path, path: str) -> dict[str, Any]:
    where = str(folder.absolute() / path.replace('/', '.'))  # Orbax's name of the array
    kvstore = {'driver': 'file', 'path': f'{where}/'}
    return {'driver': 'zarr3', 'kvstore': kvstore}


class Reader:
    """The parameters at the paths `names` of a target, a layer at a time."""

    def __init__(self, folder: pathlib.Path, names: Iterable[str]):
        params = folder / PARAMS
        self._arrays: dict[str, Any] = {
            name: ts.open(_spec(params, name), read=True).result() for name in names
        }
        self.shapes = {
            name: jax.ShapeDtypeStruct(tuple(array.shape), array.dtype.numpy_dtype)
            for name, array in self._arrays.items()
        }

    def get(self, path: str, index: int | None) -> np.ndarray:
        array = self._arrays[path]
        chunk = array.chunk_layout.read_chunk.shape[index is not None :]
        array = array if index is None else array[index]
        if not array.shape or (rows := chunk[0]) >= array.shape[0]:
            return array.read().result()
        # Left to itself TensorStore holds many pieces beside the array that they go into.
        value = np.empty(array.shape, array.dtype.numpy_dtype)
        for row in range(0, len(value), rows):
            part = slice(row, min(row + rows, len(value)))
            value[part] = array[part].read().result()
        return value
