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
from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.mlp import Mlp
from metacanvas_jax.layers.norm import LayerNorm
from metacanvas_jax.mllm.positions import keyframe_ids
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Prompt


class VanillaBlock(nnx.Module):
    """A standard pre-norm transformer block over one keyframe (spec.md section 3.2)."""

    def __init__(self, config: CanvasConfig, width: int, *, rngs: nnx.Rngs):
        self.heads = width // config.head_dim
        self.norm1, self.norm2 = LayerNorm(width, 1e-6), LayerNorm(width, 1e-6)
        self.qkv = Linear(width, 3 * width, ('embed', 'heads'), rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), rngs=rngs)
        self.mlp = Mlp(width, 4 * width, width, rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        qkv = jax.numpy.split(self.qkv(self.norm1(x_BSD)), 3, -1)
        x = x_BSD + self.out(merge_heads(attend(*(split_heads(a, self.heads) for a in qkv))))
        return x + self.mlp(self.norm2(x))


class Identity(nnx.Module):
    """ "Remove vanilla transformer block"."""

    def __init__(self, config: CanvasConfig, width: int, *, rngs: nnx.Rngs):
        del config, width, rngs

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return x_BSD


ALIGN = {'transformer': VanillaBlock, 'none': Identity}


class Canvas(nnx.Module):
    def __init__(self, config: CanvasConfig, width: int, backbone: Backbone, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = CanvasTokens(config, width, rngs=rngs)
        self.align = ALIGN[config.align](config, width, rngs=rngs)
        self.fusion = FUSIONS[config.fuse](config, width, backbone, rngs=rngs)

    def draw(self, mllm: Qwen, prompt: Prompt, kv, grid: tuple[int, int, int], key):
        """Canvas tokens read the prompt through the MLLM; made ready for a (T, h, w) token grid."""
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
            kv,
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

    def draw(self, mllm, prompt, kv, grid, key):
        del mllm, prompt, kv, grid, key
