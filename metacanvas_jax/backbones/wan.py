"""Wan: a DiT of full attention over space and time (arXiv 2503.20314), as Wan2.2-TI2V-5B has it.

Names are those of diffusers' WanTransformer3DModel. Each block, for the six modulations of time:
    x += gate * Attention(LN(x) (1 + scale) + shift)
    x += CrossAttention(LayerNorm(x), context)
    x += gate * FFN(LN(x) (1 + scale) + shift)
q and k are normalised over all heads at once; in the first, their place in (t, h, w) rotates them.
Every latent frame has its own time, so given frames and references are told to be clean.

MetaCanvas' layout (Fig. 3, after Wan-Animate): [R reference slots | T frames] in time and, once
widened, [noisy | condition | mask] in channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.backbones.wan_config import MASK_CHANNELS, WanConfig
from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal, zeros
from metacanvas_jax.layers.mlp import Mlp
from metacanvas_jax.layers.norm import LayerNorm, RmsNorm, layer_norm, modulate
from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.layers.rope import grid_rotary, rotate_pairs
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.layers.timestep import sinusoid
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import InputError, Patches, Visual

THETA = 1e4


class TextEmbedder(nnx.Module):
    """Wan's own, for the states of its text encoder."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        D, init = config.width, normal(0.02)
        self.linear_1 = Linear(config.text_dim, D, ('embed', 'mlp'), init=init, rngs=rngs)
        self.linear_2 = Linear(D, D, ('mlp', 'embed'), init=init, rngs=rngs)

    def __call__(self, context_BLD: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(context_BLD), approximate=True))


class NoTextEmbedder(nnx.Module):
    """The context comes at the width of the DiT: MetaCanvas' connector gives it so."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        del config, rngs

    def __call__(self, context_BLD: jax.Array) -> jax.Array:
        return context_BLD


# config.text_embedder -> what the context goes through
TEXT_EMBEDDERS = {'mlp': TextEmbedder, 'none': NoTextEmbedder}


class TimeEmbedder(nnx.Module):
    """Times in 0..1 -> embeddings (..., D) and the blocks' six modulations (..., 6, D), in fp32."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        D, init = config.width, normal(0.02)
        self.channels = config.freq_dim
        self.linear_1 = Linear(config.freq_dim, D, ('channels', 'mlp'), init=init, rngs=rngs)
        self.linear_2 = Linear(D, D, ('mlp', 'embed'), init=init, rngs=rngs)
        self.time_proj = Linear(D, 6 * D, ('embed', 'mlp'), rngs=rngs)

    def __call__(self, t_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jax.nn.silu(self.linear_1(sinusoid(1000 * t_BT, self.channels)))
        embedding_BTD = self.linear_2(hidden)
        modulation = self.time_proj(jax.nn.silu(embedding_BTD))
        return embedding_BTD, rearrange(modulation, 'B T (n D) -> B T n D', n=6)


class ConditionEmbedding(nnx.Module):
    """What condition and mask add to the tokens: the new columns of the input layer, at first zero.

    A layer of its own beside `patch_embedding`, so that adding its zeros changes no bit.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        pixels = config.patch_size**2 * config.condition_channels
        axes = ('channels', 'embed')
        self.linear = Linear(pixels, config.width, axes, bias=False, init=zeros, rngs=rngs)

    def __call__(self, patches_BThwX: jax.Array) -> jax.Array:
        return self.linear(patches_BThwX)


class NoConditionEmbedding(nnx.Module):
    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        del rngs
        self.channels = config.in_channels

    def __call__(self, patches_BThwX: jax.Array) -> jax.Array:
        raise InputError(
            f'a Wan of {self.channels} input channels sees no references and no conditions; '
            'widen it first'
        )


class Attention(nnx.Module):
    """q, k, v and output of one attention; the norms see all heads as one vector."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        D, self.heads = config.width, config.num_attention_heads
        self.to_q = Linear(D, D, ('embed', 'heads'), rngs=rngs)
        self.to_k = Linear(D, D, ('embed', 'heads'), rngs=rngs)
        self.to_v = Linear(D, D, ('embed', 'heads'), rngs=rngs)
        self.to_out = Linear(D, D, ('heads', 'embed'), rngs=rngs)
        self.norm_q, self.norm_k = RmsNorm(D, config.eps), RmsNorm(D, config.eps)

    def qkv(self, x_BSD, context_BLD) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k = self.norm_q(self.to_q(x_BSD)), self.norm_k(self.to_k(context_BLD))
        v = self.to_v(context_BLD)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)


class WanBlock(nnx.Module):
    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        D, self.eps = config.width, config.eps
        self.attn1 = Attention(config, rngs=rngs)
        self.norm2 = LayerNorm(D, config.eps)
        self.attn2 = Attention(config, rngs=rngs)
        self.ffn = Mlp(D, config.ffn_dim, D, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, D)) * D**-0.5
        self.scale_shift_table = nnx.Param(table, axes=(None, 'embed'))

    def __call__(self, x_BTSD, time_BT6D, rotary, context_BLD, context_length_B) -> jax.Array:
        """S tokens in each of T frames; `rotary` are the tables of all T S."""
        x_BTSD = constrain(x_BTSD, BATCH_AXES, None, None, None)
        T = x_BTSD.shape[1]
        e = self.scale_shift_table[...].astype(jnp.float32) + time_BT6D
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (e[:, :, i, None] for i in range(6))

        y = _modulated_norm(x_BTSD, shift_a, scale_a, self.eps)
        y = rearrange(y, 'B T S D -> B (T S) D')
        q, k, v = self.attn1.qkv(y, y)
        y = merge_heads(attend(rotate_pairs(q, *rotary), rotate_pairs(k, *rotary), v))
        y = rearrange(self.attn1.to_out(y), 'B (T S) D -> B T S D', T=T)
        x = (x_BTSD + gate_a * y).astype(x_BTSD.dtype)

        y = rearrange(self.norm2(x), 'B T S D -> B (T S) D')
        y = merge_heads(attend(*self.attn2.qkv(y, context_BLD), length_B=context_length_B))
        x = x + rearrange(self.attn2.to_out(y), 'B (T S) D -> B T S D', T=T)

        y = self.ffn(_modulated_norm(x, shift_f, scale_f, self.eps))
        return (x + gate_f * y).astype(x.dtype)


def _modulated_norm(x, shift, scale, eps: float) -> jax.Array:
    return modulate(layer_norm(x.astype(jnp.float32), eps), shift, scale).astype(x.dtype)


class Wan(Backbone):
    def __init__(self, config: WanConfig, *, remat: str, dtype, rngs: nnx.Rngs):
        D, p = config.width, config.patch_size
        self.config, self.remat, self.dtype = config, remat, dtype
        self.width, self.patch, self.latent_channels = D, p, config.out_channels
        self.context_width = config.context_width
        pixels = p * p * config.out_channels
        self.patch_embedding = Linear(pixels, D, ('channels', 'embed'), rngs=rngs)
        self.condition_embedding = _condition_embedding(config, rngs)
        self.time_embedder = TimeEmbedder(config, rngs=rngs)
        self.text_embedder = TEXT_EMBEDDERS[config.text_embedder](config, rngs=rngs)
        self.blocks = stack(lambda rngs: WanBlock(config, rngs=rngs), config.num_layers, rngs)
        table = jax.random.normal(rngs.params(), (2, D)) * D**-0.5
        self.scale_shift_table = nnx.Param(table, axes=(None, 'embed'))
        self.proj_out = Linear(D, pixels, ('embed', 'channels'), init=zeros, rngs=rngs)

    def patchify(self, z_BTHWC, visual: Visual) -> Patches:
        target = self._embed(z_BTHWC, visual.condition_BTHWC, visual.mask_BTHW4)
        if (references := visual.references_BRHWC) is None:
            return Patches(target_BThwD=target, extra=None)
        kept = jnp.ones((*references.shape[:-1], MASK_CHANNELS))
        return Patches(target_BThwD=target, extra=self._embed(references, references, kept))

    def _embed(self, z_BTHWC, condition_BTHWC, mask_BTHW4) -> jax.Array:
        x = self.patch_embedding(to_patches(z_BTHWC.astype(self.dtype), self.patch))
        if condition_BTHWC is None:
            return x
        if mask_BTHW4 is None:
            mask_BTHW4 = jnp.zeros((*condition_BTHWC.shape[:-1], MASK_CHANNELS))
        given = jnp.concatenate([condition_BTHWC, mask_BTHW4], -1).astype(self.dtype)
        return x + self.condition_embedding(to_patches(given, self.patch))

    def velocity(self, patches, t_BT, context_BLD, context_length_B) -> jax.Array:
        slots = patches.target_BThwD[:, :0] if patches.extra is None else patches.extra
        x = jnp.concatenate([slots, patches.target_BThwD], 1)
        R, (T, h, w) = slots.shape[1], x.shape[1:4]
        # A few times a sample, so each frame's is embedded: its tokens share one modulation.
        embedding_BTD, time_BT6D = self.time_embedder(jnp.pad(t_BT, ((0, 0), (R, 0))))
        rotary = grid_rotary((T, h, w), self.config.rotary_widths, THETA)
        context = self.text_embedder(context_BLD.astype(self.dtype))
        x = fold(
            self.blocks,
            rearrange(x, 'B T h w D -> B T (h w) D'),
            lambda block, x: block(x, time_BT6D, rotary, context, context_length_B),
            remat=self.remat,
        )[:, R:]
        table_BT2D = self.scale_shift_table[...].astype(jnp.float32) + embedding_BTD[:, R:, None]
        shift, scale = table_BT2D[:, :, 0, None], table_BT2D[:, :, 1, None]
        x = self.proj_out(_modulated_norm(x, shift, scale, self.config.eps))
        x = rearrange(x, 'B T (h w) D -> B T h w D', h=h)
        return from_patches(x, self.patch).astype(jnp.float32)


def _condition_embedding(config: WanConfig, rngs: nnx.Rngs):
    return (ConditionEmbedding if config.condition_channels else NoConditionEmbedding)(
        config, rngs=rngs
    )


def widen(model: Wan) -> Wan:
    """The model with channels for condition and mask beside the noisy ones; the same velocity.

    Its other parameters are those of `model` itself.
    """
    graphdef, state = nnx.split(model)
    wide = nnx.merge(graphdef, state)
    channels = 2 * model.config.out_channels + MASK_CHANNELS
    wide.config = dataclasses.replace(model.config, in_channels=channels)
    wide.condition_embedding = ConditionEmbedding(wide.config, rngs=nnx.Rngs(0))
    return wide
