"""Learnable canvas tokens, a (K, h, w) grid of embeddings (Sec. 3.3)."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from metacanvas_jax.canvas.config import CanvasConfig
from metacanvas_jax.layers.resize import resize
from metacanvas_jax.mllm.positions import canvas_positions, text_positions

POSITIONS = {'mrope': canvas_positions, 'text': text_positions}

# Which canvas token sees which.
ATTENTION = {
    'causal': lambda M: np.tril(np.ones((M, M), bool)),
    'bidirectional': lambda M: np.ones((M, M), bool),
}


class CanvasTokens(nnx.Module):
    def __init__(self, config: CanvasConfig, width: int, *, rngs: nnx.Rngs):
        shape = (config.keyframes, *config.grid, width)
        # 0.02 is the scale of the MLLM's own embeddings.
        table = 0.02 * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(table, axes=(None, 'canvas', 'canvas', 'embed'))

    def __call__(self, batch: int, keyframes: int, h: int, w: int) -> jax.Array:
        """(B, K h w, D); a single frame takes keyframe 0 only (spec.md section 2.3)."""
        table_KhwD = resize(self.table[...][:keyframes], h, w)
        tokens_MD = rearrange(table_KhwD, 'K h w D -> (K h w) D')
        return repeat(tokens_MD, 'M D -> B M D', B=batch)


def canvas_grid(config: CanvasConfig, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """(K, h, w) of the canvas for a (T, h, w) token grid of the DiT."""
    T, h, w = grid
    keyframes = config.keyframes if T > 1 else 1
    return keyframes, -(-h // config.stride), -(-w // config.stride)


def canvas_mask(config: CanvasConfig, size: int) -> jax.Array:
    return jnp.asarray(ATTENTION[config.attention](size))
