"""Qwen2.5-VL's vision tower: windows of patches in, vision tokens out.

Patches lie in windows (`mllm/windows.py`), so most blocks attend within one row of a batch of
windows, and a few within whole pictures, whose windows stand side by side. Key lengths alone tell
padding from patches: attention never needs a mask. A video is one picture per temporal patch, and
no picture sees another.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, struct

from metacanvas_jax.layers import rope
from metacanvas_jax.layers.attention import attend, merge_heads
from metacanvas_jax.layers.linear import Linear, normal
from metacanvas_jax.layers.mlp import SwiGlu
from metacanvas_jax.layers.norm import RmsNorm
from metacanvas_jax.layers.stack import scan, stack
from metacanvas_jax.mllm.config import QwenConfig, VisionConfig
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import Array, Vision

EPS, THETA = 1e-6, 1e4  # in no config.json


@struct.dataclass
class Places:
    """Where patches are and who sees whom, the same in every block."""

    angle_BIVPe: Array
    length_BIV: Array
    order_BIS: Array  # the slots of a picture, patches before padding (S = V P)
    length_BI: Array


def find_places(vision: Vision, config: VisionConfig) -> Places:
    P = vision.patches_BIVPX.shape[3]
    # Half of the frequencies turn with the row, half with the column.
    angle = rope.angles(vision.place_BIVP2, config.head_dim // 2, THETA)
    padding = jnp.arange(P) >= jnp.asarray(vision.length_BIV)[..., None]
    order = jnp.argsort(rearrange(padding, 'B I V P -> B I (V P)'), axis=-1, stable=True)
    return Places(
        angle_BIVPe=rearrange(angle, 'B I V P z e -> B I V P (z e)'),
        # An empty row sees its first slot of padding: a softmax over nothing is not a number.
        length_BIV=jnp.maximum(vision.length_BIV, 1),
        order_BIS=order,
        length_BI=jnp.maximum(vision.length_BIV.sum(-1), 1),
    )


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_heads
        init = normal(config.initializer_range)
        linear = functools.partial(Linear, init=init, rngs=rngs)
        self.qkv = linear(width, 3 * width, ('embed', 'heads'))
        self.proj = linear(width, width, ('heads', 'embed'))

    def __call__(self, x_BIVPD, places: Places, full):
        qkv = rearrange(self.qkv(x_BIVPD), 'B I V P (z N E) -> z (B I V) P N E', z=3, N=self.heads)
        angle = rearrange(places.angle_BIVPe, 'B I V P e -> (B I V) P e')
        q, k, v = rope.rotate_half(qkv[0], angle), rope.rotate_half(qkv[1], angle), qkv[2]
        out = jax.lax.cond(full, in_pictures, in_windows, q, k, v, places)
        return self.proj(merge_heads(out).reshape(x_BIVPD.shape))


def in_windows(q, k, v, places: Places):
    """q, k, v are (B I V, P, N, E)."""
    return attend(q, k, v, length_B=places.length_BIV.reshape(-1))


def in_pictures(q, k, v, places: Places):
    """Windows side by side; keys move up into the slots of padding, so that a length suffices."""
    shape, S = q.shape, places.order_BIS.shape[-1]
    q, k, v = (a.reshape(-1, S, *shape[2:]) for a in (q, k, v))
    order = places.order_BIS.reshape(-1, S, 1, 1)
    k, v = (jnp.take_along_axis(a, order, 1) for a in (k, v))
    return attend(q, k, v, length_B=places.length_BI.reshape(-1)).reshape(shape)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1, self.norm2 = RmsNorm(width, EPS), RmsNorm(width, EPS)
        self.attn = VisionAttention(config, rngs=rngs)
        self.mlp = SwiGlu(
            width,
            config.intermediate_size,
            lora=None,
            bias=True,
            init=normal(config.initializer_range),
            rngs=rngs,
        )

    def __call__(self, x_BIVPD, places: Places, full):
        """`full`: a boolean array, whether to see the whole picture or the own window."""
        x = constrain(x_BIVPD, BATCH_AXES)
        x = x + self.attn(self.norm1(x), places, full)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """The patches of a square, side by side, into one token of the language model's width."""

    def __init__(self, config: VisionConfig, merge: int, *, rngs: nnx.Rngs):
        width = merge**2 * config.hidden_size
        self.ln_q, self.merge = RmsNorm(config.hidden_size, EPS), merge
        init = normal(config.initializer_range)
        self.fc1 = Linear(width, width, ('embed', 'mlp'), init=init, rngs=rngs)
        self.fc2 = Linear(width, config.out_hidden_size, ('mlp', 'embed'), init=init, rngs=rngs)

    def __call__(self, x_BIVPD):
        x = rearrange(self.ln_q(x_BIVPD), 'B I V (Q m) D -> B (I V Q) (m D)', m=self.merge**2)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: QwenConfig, sizes: VisionConfig, *, remat: str, dtype, rngs):
        self.config, self.remat, self.dtype = sizes, remat, dtype
        # A convolution whose stride is its kernel: a matrix over flattened patches.
        self.patch_embed = Linear(
            sizes.patch_values,
            sizes.hidden_size,
            ('channels', 'embed'),
            bias=False,
            init=normal(sizes.initializer_range),
            rngs=rngs,
        )
        self.blocks = stack(lambda rngs: VisionBlock(sizes, rngs=rngs), sizes.depth, rngs)
        self.merger = Merger(sizes, config.spatial_merge_size, rngs=rngs)

    def __call__(self, vision: Vision) -> jax.Array:
        """Vision tokens (B, J, D), window by window; `vision.token_BL` points at them."""
        places = find_places(vision, self.config)
        x = self.patch_embed(jnp.asarray(vision.patches_BIVPX, self.dtype))
        x, _ = scan(
            self.blocks,
            x,
            lambda block, x, full: (block(x, places, full), None),
            full_attention(self.config),
            remat=self.remat,
        )
        return self.merger(x)


def full_attention(config: VisionConfig) -> np.ndarray:
    """For each block, whether it sees whole pictures."""
    return np.isin(np.arange(config.depth), config.fullatt_block_indexes)
