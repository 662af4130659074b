"""Our parameters -> published weights, in shards, with the published names."""

import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert import registry
from convert.family import Layout, parameters
from convert.importing import SETTINGS, TOKENIZER, write_config
from convert.rules import Piece, Shapes, pieces, published_shapes
from convert.shards import SHARD, Shards
from convert.source import open_source
from convert.target import Reader, check_space, new_folder
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import is_orbax, weight_shapes

Get = Callable[[str, int | None], np.ndarray]


def export_weights(
    component: str, source: str, target: str, *, layout: str | None = None, limit: int = SHARD
) -> str:
    """Converts the target of an import, or weights in our own names; returns a sentence."""
    family, chosen = registry.find(component), _layout(component, layout)
    folder = pathlib.Path(source)
    if not folder.is_dir():
        raise InputError(f'no such folder: {folder}')
    shapes, get = _own(folder)
    sizes = family.sizes(folder, shapes)
    _compare(shapes, family.parameters(sizes), source)
    copied = [folder / name for name in (*SETTINGS, *TOKENIZER) if (folder / name).is_file()]
    with new_folder(pathlib.Path(target).absolute()) as partial:
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        count = _write(partial, chosen, sizes, shapes, get, limit)
    return f'{target}: {count} tensors, {sum(a.size for a in shapes.values())} parameters'


def export(
    component: str, module: nnx.Module, target: str | pathlib.Path, *, layout: str | None = None
) -> None:
    """Writes a module as published weights with their config.json into a new folder."""
    family = registry.find(component)
    chosen = _layout(component, layout)
    values = parameters(module)
    sizes = family.sizes_of(module)
    _compare(values, family.parameters(sizes), f'the module {type(module).__name__}')

    def get(path: str, index: int | None) -> np.ndarray:
        return np.asarray(values[path] if index is None else values[path][index])

    with new_folder(pathlib.Path(target).absolute()) as partial:
        write_config(sizes, partial)
        shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in values.items()}
        _write(partial, chosen, sizes, shapes, get, SHARD)


def _layout(component: str, name: str | None) -> Layout:
    layouts = registry.find(component).layouts
    if name is None:
        return next(iter(layouts.values()))
    if name not in layouts:
        raise InputError(f'{component} has no layout {name!r}; there are: {", ".join(layouts)}')
    return layouts[name]


def _own(folder: pathlib.Path) -> tuple[Shapes, Get]:
    """The parameters in a folder that a model can start from."""
    if is_orbax(folder):
        reader = Reader(folder, list(weight_shapes(folder)))
        return reader.shapes, reader.get
    opened = open_source(str(folder))
    read = functools.lru_cache(1)(opened.read)  # whole stacks: such files are small

    def get(path: str, index: int | None) -> np.ndarray:
        return read(path) if index is None else read(path)[index]

    return opened.tensors, get


def _compare(have: Any, want: Shapes, where: str) -> None:
    wrong = [f'lacks {path}' for path in want if path not in have]
    wrong += [f'holds {path}, unknown to the model' for path in have if path not in want]
    wrong += [
        f'{path} is {have[path].shape} there, {shape.shape} in the model'
        for path, shape in want.items()
        if path in have and have[path].shape != shape.shape
    ]
    if wrong:
        more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise InputError(f'{where} does not fit its config: {"; ".join(wrong[:5])}{more}')


def _write(
    folder: pathlib.Path, layout: Layout, sizes: Any, shapes: Shapes, get: Get, limit: int
) -> int:
    check_space(folder, sum(a.size * a.dtype.itemsize for a in shapes.values()))
    found = pieces(layout.rules(sizes), shapes)
    filled = {path for piece in found for path in piece.paths}
    assert filled == set(shapes), f'no rule for {sorted(set(shapes) - filled)[:3]}'
    published = published_shapes(found, shapes)
    shards = Shards(folder, published, stem=layout.file, limit=limit)
    for piece in found:
        _convert(piece, get, shards)
    shards.close()
    return len(published)


def _convert(piece: Piece, get: Get, shards: Shards) -> None:
    """A function of its own, so that one piece is forgotten before the next one is read."""
    values = piece.rule.op.backward(*(get(path, piece.index) for path in piece.paths))
    for name, value in zip(piece.names, values, strict=True):
        shards.put(name, value)
