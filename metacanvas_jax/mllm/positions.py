"""Multimodal RoPE position ids (Sec. 3.2; spec.md section 2.5).

Text advances the three axes (t, h, w) together; a vision block starting at p holds
(p + time, p + row, p + column). The canvas starts at s = 1 + the largest id of the prefix:
    t = s + tau_k,  h = s + i,  w = s + j.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.layers import rope
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.types import InputError

Grid = tuple[int, int, int]  # temporal, row and column patches of a picture or video, unmerged


def _legacy(position: int, block_3n: np.ndarray, grid: Grid) -> int:
    """transformers 4.4x to 4.5x, in force when the paper was written."""
    return int(block_3n.max()) + 1


def _hf5(position: int, block_3n: np.ndarray, grid: Grid) -> int:
    """transformers 5: the temporal extent of a video is ignored."""
    return position + max(grid[1:])


# Where text goes on after a vision block.
TEXT_RULES = {'legacy': _legacy, 'hf5': _hf5}


def prefix_positions(
    ids: Sequence[int],
    config: QwenConfig,
    *,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    rule: str = 'legacy',
) -> tuple[np.ndarray, int]:
    """Ids (3, L) of one unpadded prompt, and the first free position s."""
    merge = config.spatial_merge_size
    images = iter([(*grid, 0.0) for grid in image_grids])
    seconds = itertools.chain(seconds_per_grid, itertools.repeat(1.0))
    videos = iter([(*grid, next(seconds) * config.tokens_per_second) for grid in video_grids])
    vision = {config.image_token_id: images, config.video_token_id: videos}

    tokens = np.asarray(ids)
    blocks, position, start = [], 0, 0
    while start < len(tokens):
        kind = int(tokens[start])
        if kind not in vision:
            same = np.isin(tokens[start:], list(vision))
            length = int(same.argmax()) if same.any() else len(same)
            blocks.append(np.tile(np.arange(position, position + length), (3, 1)))
            start, position = start + length, position + length
            continue
        grid = next(vision[kind], None)
        if grid is None:
            raise InputError(f'the prompt has more vision blocks of token {kind} than grids given')
        t, h, w, interval = grid[0], grid[1] // merge, grid[2] // merge, grid[3]
        block = np.indices((t, h, w)).reshape(3, -1)
        block[0] = (block[0] * interval).astype(int)
        block += position
        blocks.append(block)
        start, position = start + t * h * w, TEXT_RULES[rule](position, block, (t, h, w))
    positions_3L = np.concatenate(blocks, 1).astype(np.int32)
    if positions_3L.shape[1] != len(tokens):
        raise InputError(
            f'the prompt has {len(tokens)} tokens, its text and grids make {positions_3L.shape[1]}'
        )
    return positions_3L, int(positions_3L.max()) + 1


def canvas_positions(start_B, keyframe_ids_K, h: int, w: int) -> jax.Array:
    """(B, 3, K h w): keyframe-major, then rows, then columns."""
    tau_K = jnp.asarray(keyframe_ids_K, jnp.int32)
    k, i, j = jnp.indices((len(tau_K), h, w), dtype=jnp.int32).reshape(3, -1)
    return jnp.stack([tau_K[k], i, j]) + start_B[:, None, None]


def text_positions(start_B, keyframe_ids_K, h: int, w: int) -> jax.Array:
    """Table 10's ablation: canvas tokens numbered like text, s + n on all axes."""
    n = jnp.arange(len(keyframe_ids_K) * h * w, dtype=jnp.int32)
    return jnp.broadcast_to(n, (3, len(n))) + start_B[:, None, None]


def keyframe_ids(
    keyframes: int, frames: int, *, frame_seconds: float, tokens_per_second: float
) -> np.ndarray:
    """tau_k = floor(tokens per second x time of keyframe k): Qwen's absolute time for videos.

    `frames` are latent frames, `frame_seconds` the time between two of them.
    """
    if keyframes == 1 or frames == 1:
        return np.zeros(keyframes, np.int32)
    step = (frames - 1) / (keyframes - 1)
    # 1e-6: a keyframe meant to lie on a whole id must not fall below it by rounding.
    time = np.arange(keyframes) * step * frame_seconds * tokens_per_second
    return np.floor(time + 1e-6).astype(np.int32)


def mrope_angles(positions_B3L, config: QwenConfig) -> jax.Array:
    """Rotary angles (B, L, E/2): frequencies [0,16) turn with t, [16,40) with h, [40,64) with w."""
    angle_B3Le = rope.angles(positions_B3L, config.head_dim, config.rope_theta)
    cuts = np.cumsum(config.mrope_section)[:-1]
    parts = jnp.split(angle_B3Le, cuts, -1)
    return jnp.concatenate([part[:, axis] for axis, part in enumerate(parts)], -1)
