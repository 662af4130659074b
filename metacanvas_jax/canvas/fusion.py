"""Ways of putting the canvas into the noisy latents (Sec. 3.4, Fig. 2, Table 3).

Each owns its zero-initialised projections, so at the start the DiT computes what it did without:
    C  = interpolate(P1(aligned canvas))
    L' = L + P2(Block(L + C, t))            DitFusion, P1 = P2 = 0
    L' = L + C                              AddFusion, P1 = 0
    z' = z + C                              LatentFusion, before patchify
The gradient still arrives: P2 learns first, since its input holds L; then P1, then the canvas.
Two zero projections in series without L between them would never learn, so AddFusion has one.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.canvas.config import CanvasConfig
from metacanvas_jax.layers.attention import linear_attention, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, zeros
from metacanvas_jax.layers.mlp import GluMbConv
from metacanvas_jax.layers.norm import layer_norm, modulate
from metacanvas_jax.layers.patch import from_patches
from metacanvas_jax.layers.resize import resize, spread_keyframes
from metacanvas_jax.layers.timestep import AdaLayerNormSingle
from metacanvas_jax.types import Patches

HEAD_DIM = 32  # of SANA's linear attention
MLP_RATIO = 2.5


class Fusion(nnx.Module, abc.ABC):
    """`prepare` runs once per sample, the other two at every solver step.

    Clean frames (time 0) are left alone: the canvas is for noisy latents only (Sec. 3.4; Alg. 1
    adds it to all).
    """

    @abc.abstractmethod
    def prepare(self, canvas_BKhwD, grid: tuple[int, int, int]):
        """Aligned canvas states -> what the later calls get, for a (T, h, w) token grid."""

    @abc.abstractmethod
    def before_patchify(self, z_BTHWC, canvas, clean_BT) -> jax.Array: ...

    @abc.abstractmethod
    def after_patchify(self, patches: Patches, canvas, t_BT, clean_BT) -> Patches: ...

    @abc.abstractmethod
    def features(self, patches: Patches, canvas, t_BT) -> jax.Array | None:
        """What the canvas adds, (B, T, h, w, D): the maps of App. I."""


def _interpolate(canvas_BKhwD, grid):
    T, h, w = grid
    return spread_keyframes(resize(canvas_BKhwD, h, w), T)


def _add(x_BThwD, delta_BThwD, clean_BT):
    noisy = (1 - clean_BT)[:, :, None, None, None]
    return x_BThwD + noisy.astype(x_BThwD.dtype) * delta_BThwD.astype(x_BThwD.dtype)


class NoFusion(Fusion):
    """The plain backbone."""

    def prepare(self, canvas_BKhwD, grid):
        del canvas_BKhwD, grid

    def before_patchify(self, z_BTHWC, canvas, clean_BT):
        del canvas, clean_BT
        return z_BTHWC

    def after_patchify(self, patches, canvas, t_BT, clean_BT):
        del canvas, t_BT, clean_BT
        return patches

    def features(self, patches, canvas, t_BT):
        del patches, canvas, t_BT


class LatentFusion(Fusion):
    """The canvas squeezed into latent channels and added before patchify (Table 3, last row)."""

    def __init__(self, config: CanvasConfig, d_in: int, backbone: Backbone, *, rngs: nnx.Rngs):
        del config
        self.patch = backbone.patch
        d_out = self.patch**2 * backbone.latent_channels
        self.project = Linear(d_in, d_out, ('embed', 'channels'), init=zeros, rngs=rngs)

    def prepare(self, canvas_BKhwD, grid):
        return from_patches(_interpolate(self.project(canvas_BKhwD), grid), self.patch)

    def before_patchify(self, z_BTHWC, canvas, clean_BT):
        return _add(z_BTHWC, canvas, clean_BT)

    def after_patchify(self, patches, canvas, t_BT, clean_BT):
        del canvas, t_BT, clean_BT
        return patches

    def features(self, patches, canvas, t_BT):
        del patches, t_BT
        return canvas


class AddFusion(Fusion):
    """Patch-wise sum and nothing more ("Remove DiT block")."""

    def __init__(self, config: CanvasConfig, d_in: int, backbone: Backbone, *, rngs: nnx.Rngs):
        del config
        self.project = Linear(d_in, backbone.width, ('embed', None), init=zeros, rngs=rngs)

    def prepare(self, canvas_BKhwD, grid):
        return _interpolate(self.project(canvas_BKhwD), grid)

    def before_patchify(self, z_BTHWC, canvas, clean_BT):
        del canvas, clean_BT
        return z_BTHWC

    def after_patchify(self, patches, canvas, t_BT, clean_BT):
        del t_BT
        return dataclasses.replace(
            patches, target_BThwD=_add(patches.target_BThwD, canvas, clean_BT)
        )

    def features(self, patches, canvas, t_BT):
        del patches, t_BT
        return canvas


class CanvasBlock(nnx.Module):
    """SANA's DiT block without cross-attention, per frame (Alg. 1; spec.md section 3.3)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.heads = width // HEAD_DIM
        linear = functools.partial(Linear, width, width, bias=False, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (linear(('embed', 'heads')) for _ in range(3))
        self.to_out = Linear(width, width, ('heads', 'embed'), rngs=rngs)
        self.ff = GluMbConv(width, MLP_RATIO, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, width)) * width**-0.5
        self.scale_shift_table = nnx.Param(table, axes=(None, 'embed'))

    def __call__(self, x_BhwD: jax.Array, time_B6D: jax.Array) -> jax.Array:
        h = x_BhwD.shape[1]
        e = (self.scale_shift_table[...] + time_B6D)[:, :, None].astype(x_BhwD.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (e[:, i] for i in range(6))
        x = rearrange(x_BhwD, 'B h w D -> B (h w) D')
        y = modulate(layer_norm(x, 1e-6), shift_a, scale_a)
        q, k, v = (split_heads(f(y), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        x = x + gate_a * self.to_out(merge_heads(linear_attention(q, k, v)))
        # diffusers' norm2 stays, although the cross-attention that it came with is gone.
        y = modulate(layer_norm(x, 1e-6), shift_f, scale_f)
        y = self.ff(rearrange(y, 'B (h w) D -> B h w D', h=h))
        x = x + gate_f * rearrange(y, 'B h w D -> B (h w) D')
        return rearrange(x, 'B (h w) D -> B h w D', h=h)


class NoTimestep(nnx.Module):
    """Only the block's own table modulates ("Remove timestep condition")."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        del rngs
        self.width = width

    def __call__(self, t_B, dtype):
        return jnp.zeros((len(t_B), 6, self.width), dtype), None


class DitFusion(Fusion):
    """Figure 2: latents + canvas -> DiT block with AdaLN -> zero linear -> back on the latents."""

    def __init__(self, config: CanvasConfig, d_in: int, backbone: Backbone, *, rngs: nnx.Rngs):
        width = backbone.width
        self.project = Linear(d_in, width, ('embed', None), init=zeros, rngs=rngs)
        self.time = TIME[config.time](width, rngs=rngs)
        self.block = CanvasBlock(width, rngs=rngs)
        self.out = Linear(width, width, ('embed', None), init=zeros, rngs=rngs)

    def prepare(self, canvas_BKhwD, grid):
        return _interpolate(self.project(canvas_BKhwD), grid)

    def before_patchify(self, z_BTHWC, canvas, clean_BT):
        del canvas, clean_BT
        return z_BTHWC

    def features(self, patches, canvas, t_BT):
        x_BThwD = patches.target_BThwD
        B, T = x_BThwD.shape[:2]
        # Alg. 1: one time per sample, the last frame's; references stand in front of the targets.
        time_B6D, _ = self.time(t_BT[:, -1], x_BThwD.dtype)
        x = rearrange(x_BThwD + canvas.astype(x_BThwD.dtype), 'B T h w D -> (B T) h w D')
        x = self.out(self.block(x, jnp.repeat(time_B6D, T, 0)))
        return rearrange(x, '(B T) h w D -> B T h w D', B=B)

    def after_patchify(self, patches, canvas, t_BT, clean_BT):
        delta = self.features(patches, canvas, t_BT)
        return dataclasses.replace(
            patches, target_BThwD=_add(patches.target_BThwD, delta, clean_BT)
        )


TIME = {'adaln': AdaLayerNormSingle, 'none': NoTimestep}
FUSIONS = {'dit': DitFusion, 'add': AddFusion, 'latents': LatentFusion}
