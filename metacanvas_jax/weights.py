"""Weights that a run starts from: a folder with config.json beside one of two kinds of arrays.

model.safetensors   our own paths, as a run exports them; read whole
params/             an Orbax tree, as `convert import` writes it; each device reads its part
"""

import gc
import hashlib
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (safetensors.numpy reads bfloat16 only when this is imported first)
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import nnx, traverse_util

from metacanvas_jax.types import InputError

PARAMS = 'params'

Folder = str | os.PathLike[str]


# ---------------------------------------------------------------- into a model


def match_weights(
    state: nnx.State,
    folder: Folder,
    prefix: str,
    *,
    new: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> dict[str, tuple]:
    """{name in the weights: path in `state`}; they must hold all parameters below `prefix`.

    LoRA parameters are in no weights, those below `new` may lack. What is below `unused` there may
    be nothing here. The state may be abstract. Reads no array.
    """
    shapes = weight_shapes(folder)
    flat = dict(nnx.to_flat_state(state))
    inside = {
        _name(path).removeprefix(prefix): path for path in flat if comes_from_weights(path, prefix)
    }
    inside = {k: path for k, path in inside.items() if k in shapes or not k.startswith(new)}
    shapes = {k: shape for k, shape in shapes.items() if k in inside or not k.startswith(unused)}
    wrong = [
        f'{name} is {shapes[name]} there, {flat[path].shape} here'
        for name, path in inside.items()
        if name in shapes and shapes[name] != flat[path].shape
    ]
    wrong += [f'{name} is missing there' for name in inside if name not in shapes]
    wrong += [f'{name} is unknown here' for name in shapes if name not in inside]
    if wrong:
        more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise InputError(f'{folder} does not fit this config: {"; ".join(wrong[:5])}{more}')
    return inside


def comes_from_weights(path: tuple, prefix: str) -> bool:
    """Whether weights of the part below `prefix` hold this parameter: all do but the LoRA."""
    name = _name(path)
    return name.startswith(prefix) and '/lora/' not in name


def _name(path: tuple) -> str:
    return '/'.join(map(str, path))


def place_weights(
    state: nnx.State,
    folder: Folder,
    prefix: str,
    *,
    new: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> nnx.State:
    """`state` with the parameters below `prefix` read from `folder`.

    They get the dtype and the sharding of those that they replace, which may be abstract.
    """
    flat = dict(nnx.to_flat_state(state))
    paths = match_weights(state, folder, prefix, new=new, unused=unused)
    wanted = {name: _placed(flat[path].get_value()) for name, path in paths.items()}
    values = _restore(folder, wanted) if is_orbax(folder) else _put(folder, wanted)
    return nnx.from_flat_state(
        flat | {paths[name]: flat[paths[name]].replace(value) for name, value in values.items()}
    )


def weight_shapes(folder: Folder) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in `folder`; reads no array."""
    if is_orbax(folder):
        return {name: tuple(array.shape) for name, array in _orbax_metadata(folder).items()}
    header, _ = read_header(_safetensors(folder))
    return {name: tuple(entry['shape']) for name, entry in header.items()}


def is_orbax(folder: Folder) -> bool:
    return (pathlib.Path(folder) / PARAMS).is_dir()


def fingerprint(folder: Folder) -> str:
    """A digest of the weights: of those that were converted, of what they were converted from."""
    path = pathlib.Path(folder, 'conversion.json' if is_orbax(folder) else 'model.safetensors')
    if not path.is_file():
        raise InputError(f'no weights: {path} does not exist')
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _placed(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


# ---------------------------------------------------------------- Orbax


def _orbax_metadata(folder: Folder) -> dict[str, Any]:
    path = pathlib.Path(folder).absolute() / PARAMS
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
    except Exception as error:  # Orbax has no exception of its own for it
        raise InputError(f'{path} is no Orbax checkpoint: {_first_line(error)}') from error
    return traverse_util.flatten_dict(tree, sep='/')


def _restore(folder: Folder, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Each device reads its own part, in the dtype asked for; hosts hold few arrays at a time."""
    path = pathlib.Path(folder).absolute() / PARAMS
    tree = traverse_util.unflatten_dict(wanted, sep='/')
    largest = max((a.size * a.dtype.itemsize for a in wanted.values()), default=0)
    # Orbax reads that many GB at once; one that is larger than the limit would never be read.
    limit = 2 + 2 * largest // 10**9
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit)
    args = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
    )
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            restored = checkpointer.restore(path, args=args)
    except Exception as error:  # TensorStore's are plain ValueErrors, Orbax adds Exceptions
        if 'RESOURCE_EXHAUSTED' in str(error):  # the device is full, the file is not to blame
            raise
        hush()
        raise InputError(
            f'{path} is damaged, convert it again: {_first_line(error.__cause__ or error)}'
        ) from error
    return dict(traverse_util.flatten_dict(restored, sep='/'))


def hush() -> None:
    """Drops the other reads of a failed restore, whose errors asyncio would print at exit."""
    logger, hook = logging.getLogger('asyncio'), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        gc.collect()
        time.sleep(0.2)  # for the reads that are still on their way
    finally:
        logger.disabled, sys.unraisablehook = False, hook


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------- safetensors


def _put(folder: Folder, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    arrays = load_weights(folder)
    return {
        name: jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding)
        for name, leaf in wanted.items()
    }


def load_weights(directory: Folder) -> dict[str, np.ndarray]:
    """The arrays of model.safetensors in `directory`."""
    path = _safetensors(directory)
    read_header(path)
    return safetensors.numpy.load_file(path)


def _safetensors(directory: Folder) -> pathlib.Path:
    path = pathlib.Path(directory).absolute() / 'model.safetensors'
    if not path.is_file():
        raise InputError(f'no weights: {path} does not exist')
    return path


def read_header(path: pathlib.Path) -> tuple[dict[str, dict[str, Any]], int]:
    """{name: dtype, shape, data_offsets} of a whole safetensors file, and where its data starts."""
    size = path.stat().st_size
    refuse_pointer(path)
    with path.open('rb') as file:
        head = file.read(8)
        length = int.from_bytes(head, 'little')
        start = 8 + length
        if len(head) < 8 or start > size:
            raise InputError(
                f'{path} is no whole safetensors file: it has {size} bytes, its header alone '
                f'wants {start}; download it again'
            )
        try:
            header = json.loads(file.read(length))
            header.pop('__metadata__', None)
            ends = [entry['data_offsets'][1] for entry in header.values()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f'{path} is no safetensors file: its header is not JSON') from error
    expected = start + max(ends, default=0)
    if size != expected:
        raise InputError(f'{path} has {size} bytes, its header says {expected}; download it again')
    return header, start


def refuse_pointer(path: pathlib.Path) -> None:
    """What git leaves in the place of a large file that it did not download."""
    with path.open('rb') as file:
        if file.read(8) == b'version ':
            raise InputError(
                f'{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the weights; '
                'run `git lfs pull`, or download it with `hf download`'
            )
