"""Tiny Qwen2.5-VL checkpoints as transformers publishes them, with random weights."""

import pathlib
from collections.abc import Callable

import numpy as np
import safetensors.numpy
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TEXT = dict(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=58,
)
VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    intermediate_size=24,
    out_hidden_size=64,
    fullatt_block_indexes=[1],
    patch_size=4,
    window_size=16,
)


def reference(*, tied: bool, dtype: torch.dtype = torch.float32):
    """transformers' model; every parameter is random, the norms' too."""
    rope = {'type': 'mrope', 'mrope_section': [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | dict(rope_scaling=rope, tie_word_embeddings=tied),
        vision_config=VISION,
        tie_word_embeddings=tied,
        image_token_id=59,
        video_token_id=60,
        attn_implementation='eager',
    )
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save(folder: pathlib.Path, *, tied: bool = True, dtype: torch.dtype = torch.float32):
    """In three files at least, with an index."""
    model = reference(tied=tied, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    assert len(list(folder.glob('*.safetensors'))) >= 3
    return folder


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of all safetensors files of a folder, read by the safetensors library."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob('*.safetensors')):
        arrays = safetensors.numpy.load_file(file)
        assert not found.keys() & arrays.keys()
        found |= arrays
    return found


def rewrite(
    folder: pathlib.Path,
    target: pathlib.Path,
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> pathlib.Path:
    """`folder` once more, as one file, with other tensors."""
    target.mkdir()
    arrays = {name: np.asarray(a, order='C') for name, a in change(tensors(folder)).items()}
    safetensors.numpy.save_file(arrays, target / 'model.safetensors')
    (target / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    return target


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert np.asarray(ours[name]).tobytes() == np.asarray(array).tobytes(), name
