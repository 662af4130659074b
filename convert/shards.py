"""Safetensors written a tensor at a time, in shards with an index, as transformers saves them."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from convert.rules import Shapes
from convert.source import DTYPES

SHARD = 5 * 10**9  # bytes; that of the published files
BAND = 8 << 20  # bytes copied at once
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Shards:
    """Files that hold tensors of these shapes, in this order; their contents come in any order."""

    def __init__(self, folder: pathlib.Path, shapes: Shapes, *, stem: str, limit: int = SHARD):
        groups = _split(shapes, limit)
        count = len(groups)
        files = [f'{stem}-{i:05}-of-{count:05}.safetensors' for i in range(1, count + 1)]
        files = files if count > 1 else [f'{stem}.safetensors']
        self._shapes, self._places = shapes, {}
        for file, group in zip(files, groups, strict=True):
            for name, offset in _create(folder / file, group).items():
                self._places[name] = (folder / file, offset)
        self._left = set(shapes)
        if count > 1:
            index = {
                'metadata': {'total_size': sum(map(_size, shapes.values()))},
                'weight_map': {name: path.name for name, (path, _) in self._places.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + '\n'
            (folder / f'{stem}.safetensors.index.json').write_text(text, encoding='utf-8')

    def put(self, name: str, value: np.ndarray) -> None:
        want, (path, offset) = self._shapes[name], self._places[name]
        assert (value.shape, value.dtype) == (want.shape, want.dtype), name
        with path.open('r+b') as file:
            file.seek(offset)
            for part in _bands(value):
                file.write(_dense(part).view(np.uint8).data)  # numpy writes no bfloat16
        self._left.remove(name)

    def close(self) -> None:
        assert not self._left, f'not all tensors were written: {sorted(self._left)[:3]}'


def _split(shapes: Shapes, limit: int) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if groups[-1] and size + _size(shape) > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += _size(shape)
    return groups


def _create(path: pathlib.Path, group: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """The header and empty room for the tensors; returns where in the file each one goes."""
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers asks for it
    end = 0
    for name, shape in group.items():
        begin, end = end, end + _size(shape)
        dtype = NAMES[np.dtype(shape.dtype)]
        header[name] = {'dtype': dtype, 'shape': shape.shape, 'data_offsets': [begin, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    start = 8 + len(text)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(start + end)
    return {name: start + header[name]['data_offsets'][0] for name in group}


def _bands(value: np.ndarray):
    """Rows of `value`, some at a time, so that a copy of them is small."""
    if value.ndim < 2:
        return [value.reshape(-1)]
    rows = max(1, BAND // max(1, value[0].nbytes))
    return (value[row : row + rows] for row in range(0, len(value), rows))


def _dense(part: np.ndarray) -> np.ndarray:
    """`part` in order. A transposed one by columns, some at a time, seven times as fast."""
    if part.ndim != 2 or part.flags.c_contiguous:
        return np.ascontiguousarray(part)
    copy = np.empty(part.shape, part.dtype)
    for column in range(0, part.shape[1], 16):
        copy[:, column : column + 16] = part[:, column : column + 16]
    return copy


def _size(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize
