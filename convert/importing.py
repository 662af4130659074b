"""Published weights -> our parameters: into an Orbax target, or into a module."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import registry
from convert.family import Layout
from convert.rules import Match, Piece, Shapes, match
from convert.source import Source, open_source
from convert.target import Writer, new_folder
from metacanvas_jax.types import InputError

DTYPES = ('bfloat16', 'float32')
TOKENIZER = (
    'tokenizer.json',
    'tokenizer_config.json',
    'vocab.json',
    'merges.txt',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.json',
    'chat_template.jinja',
    'tokenizer.model',
    'spiece.model',
)
# What else belongs to a model and is no weight.
SETTINGS = (
    'config.json',
    'generation_config.json',
    'preprocessor_config.json',
    'video_preprocessor_config.json',
)


def import_weights(
    component: str,
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """Converts `source` into the folder `target`; returns a sentence about it."""
    opened = open_source(source)
    layout = registry.find_layout(component, opened.tensors, source)
    sizes, shapes, found = _matched(component, layout, opened, source, dtype)
    settings = SETTINGS if layout.sizes is None else ()
    copied = [opened.folder / name for name in settings if (opened.folder / name).is_file()]
    copied += tokenizer_files(opened.folder, tokenizer)
    with new_folder(pathlib.Path(target).absolute()) as folder, _digests(opened.files) as digests:
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        if layout.sizes is not None:
            write_config(sizes, folder)
        writer = Writer(folder, shapes)
        for piece in found.pieces:
            _convert(piece, opened, writer.put)
        writer.close()
        dtypes = {path: shape.dtype.name for path, shape in shapes.items()}
        kinds = sorted(set(dtypes.values()))
        record = {
            'component': component,
            'source': source,
            'files': digests(),
            'dtype': kinds[0] if len(kinds) == 1 else dtypes,
        }
        text = json.dumps(record, indent=2) + '\n'
        (folder / 'conversion.json').write_text(text, encoding='utf-8')
    count = sum(shape.size for shape in shapes.values())
    return f'{target}: {len(opened.tensors)} tensors, {count} parameters, {", ".join(kinds)}'


def write_config(sizes: Any, folder: pathlib.Path) -> None:
    text = json.dumps(sizes.to_json(), indent=2) + '\n'
    (folder / 'config.json').write_text(text, encoding='utf-8')


def load(component: str, path: str, *, dtype: str | None = None) -> nnx.Module:
    """The published weights at `path` as our module, in host memory."""
    opened = open_source(path)
    layout = registry.find_layout(component, opened.tensors, path)
    sizes, shapes, found = _matched(component, layout, opened, path, dtype)
    values = {name: np.empty(a.shape, a.dtype) for name, a in shapes.items()}

    def put(name: str, index: int | None, value: np.ndarray) -> None:
        values[name][... if index is None else index] = value

    for piece in found.pieces:
        _convert(piece, opened, put)
    dtypes = {shape.dtype for shape in shapes.values()}
    compute = jnp.result_type(*(dtype for dtype in dtypes if dtype != np.int64))  # no counts
    graphdef, state = nnx.split(registry.find(component).abstract(sizes, compute))
    cpu = jax.local_devices(backend='cpu')[0]
    filled = {
        keys: leaf.replace(jax.device_put(values['/'.join(map(str, keys))], cpu))
        for keys, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _matched(
    component: str, layout: Layout, source: Source, where: str, dtype: str | None
) -> tuple[Any, Shapes, Match]:
    """The sizes of the source's model, its parameters, and how the source fills them."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f'--dtype {dtype!r} is unknown; there are: {", ".join(DTYPES)}')
    family = registry.find(component)
    sizes = family.published_sizes(layout, source.folder, source.tensors)
    shapes = family.parameters(sizes)
    found = match(layout.rules(sizes), layout.taken(source.tensors), shapes)
    if not found.fits:
        lists = (
            f'{len(lines)} {title}: {"; ".join(lines[:5])}{" ..." if len(lines) > 5 else ""}'
            for title, lines in found.problems().items()
        )
        raise InputError(f'{where} does not fit its config.json: {". ".join(lists)}')
    return sizes, _typed(found.pieces, source, shapes, dtype), found


def _typed(pieces: Sequence[Piece], source: Source, shapes: Shapes, dtype: str | None) -> Shapes:
    """The parameters in the dtype asked for, or in that on disk."""
    kinds: dict[str, set[str]] = {path: set() for path in shapes}
    for piece in pieces:
        for path in piece.paths:
            kinds[path] |= {source.tensors[name].dtype.name for name in piece.names}
    if dtype is None and (mixed := [path for path, names in kinds.items() if len(names) > 1]):
        names = ' and '.join(sorted(kinds[mixed[0]]))
        raise InputError(f'{mixed[0]} is in {names} on disk; give --dtype=bfloat16 or float32')
    return {
        path: jax.ShapeDtypeStruct(shape.shape, np.dtype(dtype or kinds[path].pop()))
        for path, shape in shapes.items()
    }


def _convert(piece: Piece, source: Source, put: Any) -> None:
    """A function of its own, so that one piece is forgotten before the next one is read."""
    values = piece.rule.op.forward(*(source.read(name) for name in piece.names))
    for path, value in zip(piece.paths, values, strict=True):
        put(path, piece.index, value)


def tokenizer_files(folder: pathlib.Path, given: str | None) -> list[pathlib.Path]:
    """From the folder given, the weights' own, or the one beside it: text_encoder_2/tokenizer_2."""
    beside = folder.absolute().name.replace('text_encoder', 'tokenizer')
    places = [pathlib.Path(given)] if given else [folder, folder.absolute().parent / beside]
    for place in places:
        if found := [place / name for name in TOKENIZER if (place / name).is_file()]:
            return found
    if given:
        raise InputError(f'--tokenizer {given} holds no tokenizer ({TOKENIZER[0]}, ...)')
    return []


@contextlib.contextmanager
def _digests(files: Sequence[pathlib.Path]) -> Iterator[Any]:
    """The files' names, sizes and sha256, found in a thread while they are being converted."""
    stop = threading.Event()

    def digest(file: pathlib.Path) -> dict[str, Any]:
        sha256 = hashlib.sha256()
        with file.open('rb') as stream:
            while not stop.is_set() and (data := stream.read(1 << 20)):
                sha256.update(data)
        return {'name': file.name, 'size': file.stat().st_size, 'sha256': sha256.hexdigest()}

    with ThreadPoolExecutor(1) as pool:
        found: list[Future] = [pool.submit(digest, file) for file in files]
        try:
            yield lambda: [future.result() for future in found]
        finally:
            stop.set()
