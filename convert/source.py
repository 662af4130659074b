"""Published weights, read one tensor at a time: safetensors in one file or several, or a .pth.

Tensors are read into memory of their own rather than mapped: mapped pages would stay counted to
the process long after their tensor is done with.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from metacanvas_jax.types import InputError
from metacanvas_jax.weights import PARAMS, read_header, refuse_pointer

# safetensors' names. Of numbers with 8 bits none is here: fp8 checkpoints come with scales, and
# are made from a checkpoint in bf16 that one can convert instead.
DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype(np.int64),  # batches that a BatchNorm has seen
}
PICKLES = ('.pth', '.pt', '.bin', '.ckpt')
# A folder may hold a file twice, such as model.fp16.safetensors; without an index these count.
STANDARD = ('model.safetensors', 'diffusion_pytorch_model.safetensors')


@dataclasses.dataclass(frozen=True)
class Source:
    """`tensors` are names, shapes and dtypes; `read` brings one tensor into memory."""

    folder: pathlib.Path  # where config.json and the tokenizer are looked for
    files: tuple[pathlib.Path, ...]
    tensors: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]


def open_source(where: str) -> Source:
    """A file, a folder, or the name of a repository on the Hugging Face hub."""
    path = pathlib.Path(where)
    path = path if path.exists() else _download(where)
    if path.is_dir():
        return _open_files(_weight_files(path), path)
    if path.suffix in ('.safetensors', *PICKLES):
        return _open_files([path], path.absolute().parent)
    if path.name.endswith('.safetensors.index.json'):
        return _open_files(_indexed(path), path.absolute().parent)
    raise InputError(f'{path} is neither a folder nor a .safetensors or .pth file')


def _open_files(files: Sequence[pathlib.Path], folder: pathlib.Path) -> Source:
    if files[0].suffix in PICKLES:
        return _open_pickle(files[0], folder)
    return _open_safetensors(files, folder)


# ---------------------------------------------------------------- which files


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The index is to be believed before single files: SANA's folder holds an older one beside."""
    if indexes := sorted(folder.glob('*.safetensors.index.json')):
        return _indexed(_only(indexes, folder))
    for name in STANDARD:
        if (folder / name).exists():
            return [folder / name]
    if files := sorted(folder.glob('*.safetensors')):
        return files
    if pickles := [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]:
        return [_only(pickles, folder)]
    if (folder / PARAMS).is_dir():
        raise InputError(f'{folder} holds weights that are converted already')
    inside = sorted({file.parent.name for file in folder.glob('*/*.safetensors')})
    hint = f'; give one of its folders {", ".join(inside)}' if inside else ''
    raise InputError(f'{folder} holds no .safetensors and no .pth{hint}')


def _only(files: Sequence[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    if len(files) > 1:
        names = ', '.join(file.name for file in files)
        raise InputError(f'{folder} holds several checkpoints, give one of the files: {names}')
    return files[0]


def _indexed(index: pathlib.Path) -> list[pathlib.Path]:
    """The shards that an index names; each must be there, and hold what the index says."""
    refuse_pointer(index)
    try:
        places = json.loads(index.read_text(encoding='utf-8'))['weight_map']
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{index} is no index of a sharded checkpoint: {error!r}') from error
    if outside := [name for name in shards if pathlib.PurePath(name).name != name]:
        raise InputError(f'{index} names {outside[0]!r}, which is not a file beside it')
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        tensors = sum(shard in missing for shard in places.values())
        raise InputError(
            f'{index} names {", ".join(missing)}, not in its folder ({tensors} of {len(places)} '
            'tensors); download the whole checkpoint'
        )
    for shard in shards:
        header, _ = read_header(index.parent / shard)
        if absent := [name for name in places if places[name] == shard and name not in header]:
            raise InputError(f'{index} looks for {absent[0]} in {shard}, which does not hold it')
    return [index.parent / shard for shard in shards]


def _download(where: str) -> pathlib.Path:
    """`owner/name[/folder][@revision]`, from the hub or from its cache."""
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w.-]+))?', where)
    if match is None or where.endswith(('.safetensors', '.json', *PICKLES)):
        raise InputError(f'no such file or folder: {where}')
    import huggingface_hub  # half a second, and few need it
    from huggingface_hub import errors

    name, inside, revision = match[1], match[2].strip('/'), match[3]
    kinds = ('*.safetensors', '*.json', '*.txt', '*.jinja', '*.model')
    prefix = f'{inside}/' if inside else ''
    wanted = [prefix + kind for kind in kinds] + ([f'tokenizer*/{k}' for k in kinds[1:]])
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f'no such file or folder: {where}; nor does the Hugging Face hub or its cache give '
            f'it: {first} (online: hf download {name})'
        ) from error
    return pathlib.Path(folder, inside)


# ---------------------------------------------------------------- safetensors


def _open_safetensors(files: Sequence[pathlib.Path], folder: pathlib.Path) -> Source:
    tensors: dict[str, jax.ShapeDtypeStruct] = {}
    places: dict[str, tuple[pathlib.Path, int]] = {}
    for file in files:
        for name, shape, offset in _tensors(file):
            if name in tensors:
                first = places[name][0]
                raise InputError(f'{name} is in {first} and in {file.name}; give the file you mean')
            tensors[name], places[name] = shape, (file, offset)

    def read(name: str) -> np.ndarray:
        want, (file, offset) = tensors[name], places[name]
        # As bytes: numpy reads none of ml_dtypes' types from files.
        size = want.size * want.dtype.itemsize
        raw = np.fromfile(file, np.uint8, count=size, offset=offset)
        return raw.view(want.dtype).reshape(want.shape)

    return Source(folder, tuple(files), tensors, read)


def _tensors(file: pathlib.Path) -> Iterator[tuple[str, jax.ShapeDtypeStruct, int]]:
    """Name, shape and place in the file of every tensor."""
    header, start = read_header(file)
    for name, entry in header.items():
        dtype, shape = DTYPES.get(entry['dtype']), tuple(entry['shape'])
        if dtype is None:
            kind = 'an fp8 checkpoint' if entry['dtype'].startswith('F8') else 'no such checkpoint'
            raise InputError(
                f'{name} in {file} is {entry["dtype"]}: {kind} can be converted; '
                'take the one in bf16, fp16 or fp32'
            )
        begin, end = entry['data_offsets']
        struct = jax.ShapeDtypeStruct(shape, dtype)
        if end - begin != struct.size * dtype.itemsize:
            raise InputError(
                f'{file} is damaged: {name} of shape {shape} in {entry["dtype"]} has '
                f'{end - begin} bytes'
            )
        yield name, struct, start + begin


# ---------------------------------------------------------------- torch pickles


def _open_pickle(file: pathlib.Path, folder: pathlib.Path) -> Source:
    """Only tensors are unpickled: any other object in the file could run code."""
    refuse_pointer(file)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{file}: .pth files want torch; pip install torch, or take safetensors'
        ) from error
    import pickle

    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f'{file} holds more than tensors and is refused, as loading it could run code; '
            'take the checkpoint in safetensors'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        size = file.stat().st_size
        raise InputError(f'{file} ({size} bytes) is no whole torch file: {error}') from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(f'{file} is no plain state dict: {{name: tensor}}')
    names = {torch.bfloat16: 'BF16', torch.float32: 'F32', torch.float16: 'F16'}
    for name, tensor in state.items():
        if tensor.dtype not in names:
            raise InputError(f'{name} in {file} is {tensor.dtype}; take bf16, fp16 or fp32')

    def struct(tensor: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(tensor.shape), DTYPES[names[tensor.dtype]])

    def read(name: str) -> np.ndarray:
        tensor = state[name].contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Source(folder, (file,), {name: struct(t) for name, t in state.items()}, read)
