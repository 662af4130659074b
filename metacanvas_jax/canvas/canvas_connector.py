"""The canvas: tokens through the MLLM, a vanilla block, and on to the fusion (Sec. 3.3, 3.4)."""

import jax
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.canvas.config import CanvasConfig
from metacanvas_jax.canvas.fusion import FUSIONS, NoFusion
from metacanvas_jax.canvas.tokens import (
    POSITIONS,
    CanvasTokens,
    canvas_grid,
    canvas_mask,
)
from metacanvas_jax.canvas.vanilla_block import VanillaBlock
from metacanvas_jax.mllm.positions import keyframe_ids
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Readings


class Identity(nnx.Module):
    """ "Remove vanilla transformer block"."""

    def __init__(self, head_dim: int, width: int, *, rngs: nnx.Rngs):
        del head_dim, width, rngs

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return x_BSD


ALIGN = {'transformer': VanillaBlock, 'none': Identity}


class Canvas(nnx.Module):
    def __init__(self, config: CanvasConfig, width: int, backbone: Backbone, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = CanvasTokens(config, width, rngs=rngs)
        self.align = ALIGN[config.align](config.head_dim, width, rngs=rngs)
        self.fusion = FUSIONS[config.fuse](config, width, backbone, rngs=rngs)

    def draw(self, mllm: Qwen | None, readings: Readings, grid: tuple[int, int, int], key):
        """Canvas tokens read the prompt through the MLLM; made ready for a (T, h, w) token grid."""
        prompt = readings.prompt
        assert mllm is not None
        assert prompt is not None
        K, h, w = canvas_grid(self.config, grid)
        ids_K = keyframe_ids(
            K,
            grid[0],
            frame_seconds=self.config.frame_seconds,
            tokens_per_second=mllm.config.tokens_per_second,
        )
        positions_B3M = POSITIONS[self.config.positions](prompt.start_B, ids_K, h, w)
        states_BMD = mllm.language.canvas(
            self.tokens(len(prompt.start_B), K, h, w),
            positions_B3M,
            readings.kv,
            prompt.length_B,
            canvas_mask(self.config, K * h * w),
            key,
        )
        x = self.align(rearrange(states_BMD, 'B (K S) D -> (B K) S D', K=K))
        return self.fusion.prepare(rearrange(x, '(B K) (h w) D -> B K h w D', K=K, h=h), grid)


class NoCanvas(nnx.Module):
    """The baseline without canvas tokens."""

    def __init__(self):
        self.fusion = NoFusion()

    def draw(self, mllm, readings, grid, key):
        del mllm, readings, grid, key
