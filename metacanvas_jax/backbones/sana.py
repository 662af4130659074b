"""SANA: a DiT of linear attention and Mix-FFN, without positions (arXiv 2410.10629).

Names are those of diffusers' SanaTransformer2DModel. Each block, for the six modulations of time:
    x += gate * LinearAttention(LN(x) (1 + scale) + shift)
    x += CrossAttention(x, context)
    x += gate * MixFFN(LN(x) (1 + scale) + shift)
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.layers.attention import attend, linear_attention, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal, zeros
from metacanvas_jax.layers.mlp import GluMbConv, Mlp
from metacanvas_jax.layers.norm import RmsNorm, layer_norm, modulate
from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.layers.timestep import AdaLayerNormSingle
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import Patches, Visual


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Under the names of the published config.json."""

    in_channels: int
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    num_cross_attention_heads: int
    caption_channels: int
    mlp_ratio: float
    patch_size: int

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class Projections(nnx.Module):
    """q, k, v and output of one attention."""

    def __init__(self, width: int, *, bias: bool, rngs: nnx.Rngs):
        heads = ('embed', 'heads')
        self.to_q = Linear(width, width, heads, bias=bias, rngs=rngs)
        self.to_k = Linear(width, width, heads, bias=bias, rngs=rngs)
        self.to_v = Linear(width, width, heads, bias=bias, rngs=rngs)
        self.to_out = Linear(width, width, ('heads', 'embed'), rngs=rngs)


class SanaBlock(nnx.Module):
    def __init__(self, config: SanaConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.heads, self.cross_heads = config.num_attention_heads, config.num_cross_attention_heads
        self.attn1 = Projections(D, bias=False, rngs=rngs)
        self.attn2 = Projections(D, bias=True, rngs=rngs)
        self.ff = GluMbConv(D, config.mlp_ratio, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, D)) * D**-0.5
        self.scale_shift_table = nnx.Param(table, axes=(None, 'embed'))

    def __call__(self, x_BhwD, time_B6D, context_BLD, context_length_B) -> jax.Array:
        x_BhwD = constrain(x_BhwD, BATCH_AXES, None, None, None)
        h = x_BhwD.shape[1]
        e = (self.scale_shift_table[...] + time_B6D)[:, :, None].astype(x_BhwD.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (e[:, i] for i in range(6))
        x = rearrange(x_BhwD, 'B h w D -> B (h w) D')

        y = modulate(layer_norm(x, 1e-6), shift_a, scale_a)
        attn = self.attn1
        q, k, v = (split_heads(f(y), self.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        x = x + gate_a * attn.to_out(merge_heads(linear_attention(q, k, v)))

        attn = self.attn2
        q = split_heads(attn.to_q(x), self.cross_heads)
        k, v = (split_heads(f(context_BLD), self.cross_heads) for f in (attn.to_k, attn.to_v))
        x = x + attn.to_out(merge_heads(attend(q, k, v, length_B=context_length_B)))

        y = modulate(layer_norm(x, 1e-6), shift_f, scale_f)
        y = self.ff(rearrange(y, 'B (h w) D -> B h w D', h=h))
        return rearrange(x, 'B (h w) D -> B h w D', h=h) + gate_f[:, :, None] * y


class Sana(Backbone):
    def __init__(self, config: SanaConfig, *, remat: str, dtype, rngs: nnx.Rngs):
        D, p = config.width, config.patch_size
        self.config, self.remat, self.dtype = config, remat, dtype
        self.width, self.patch = D, p
        self.latent_channels, self.context_width = config.in_channels, config.caption_channels
        pixels = p * p * config.in_channels
        self.patch_embed = Linear(pixels, D, ('channels', 'embed'), rngs=rngs)
        self.time_embed = AdaLayerNormSingle(D, rngs=rngs)
        self.caption_projection = Mlp(config.caption_channels, D, D, init=normal(0.02), rngs=rngs)
        self.caption_norm = RmsNorm(D, 1e-5)
        self.transformer_blocks = stack(
            lambda rngs: SanaBlock(config, rngs=rngs), config.num_layers, rngs
        )
        table = jax.random.normal(rngs.params(), (2, D)) * D**-0.5
        self.scale_shift_table = nnx.Param(table, axes=(None, 'embed'))
        self.proj_out = Linear(D, pixels, ('embed', 'channels'), init=zeros, rngs=rngs)

    def patchify(self, z_BTHWC, visual: Visual) -> Patches:
        del visual  # text to image only: data/tasks.py refuses the rest
        x = self.patch_embed(to_patches(z_BTHWC.astype(self.dtype), self.patch))
        return Patches(target_BThwD=x, extra=None)

    def velocity(self, patches, t_BT, context_BLD, context_length_B) -> jax.Array:
        x = patches.target_BThwD[:, 0]  # pictures: one latent frame
        time_B6D, embedding_BD = self.time_embed(t_BT[:, 0], self.dtype)
        context = self.caption_norm(self.caption_projection(context_BLD.astype(self.dtype)))
        x = fold(
            self.transformer_blocks,
            x,
            lambda block, x: block(x, time_B6D, context, context_length_B),
            remat=self.remat,
        )
        table_B2D = (self.scale_shift_table[...] + embedding_BD[:, None]).astype(x.dtype)
        shift, scale = table_B2D[:, 0, None, None], table_B2D[:, 1, None, None]
        x = self.proj_out(modulate(layer_norm(x, 1e-6), shift, scale))
        return from_patches(x[:, None], self.patch).astype(jnp.float32)
