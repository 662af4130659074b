"""FLUX.1 dev and Kontext: joint attention over pictures and text (arXiv 2506.15742).

Names are those of diffusers' FluxTransformer2DModel. The modulations of every block come from one
vector, the sum of what time, guidance and CLIP's vector of the prompt are embedded as. A double
block has weights of its own for pictures and for text, which see each other in the attention:
    x += gate * JointAttention(LN(x) (1 + scale) + shift)
    x += gate * Mlp(LN(x) (1 + scale) + shift)
A single block has the same weights for all tokens, and both parts side by side:
    y = LN(x) (1 + scale) + shift,    x += gate * Linear(Attention(y), gelu(Linear(y)))
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, struct

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal, zeros
from metacanvas_jax.layers.mlp import ACTIVATIONS, Mlp
from metacanvas_jax.layers.norm import RmsNorm, layer_norm, modulate
from metacanvas_jax.layers.rope import axis_angles, rotate_pairs
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.layers.timestep import CHANNELS, sinusoid
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import Array, InputError, Patches, Visual

PATCH = 2  # a token is 2 x 2 latent pixels
MLP_RATIO = 4
THETA = 1e4
EPS = 1e-6

Rotation = tuple[np.ndarray, np.ndarray]  # cosines and sines (S, E/2)


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Under the names of the published config.json."""

    in_channels: int  # of a token
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    axes_dims_rope: tuple[int, int, int]  # values of a head that turn with index, row and column

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise InputError(f'{field.name} {value!r} is no positive integer')
        axes = self.axes_dims_rope
        if len(axes) != 3 or not all(type(n) is int and n > 0 and n % 2 == 0 for n in axes):
            raise InputError(f'axes_dims_rope {list(axes)!r} are not three even numbers')
        if sum(axes) != self.attention_head_dim:
            raise InputError(
                f'axes_dims_rope {list(axes)!r} sum to {sum(axes)}, attention_head_dim is '
                f'{self.attention_head_dim}'
            )
        if self.in_channels % PATCH**2:
            raise InputError(f'in_channels {self.in_channels} is no multiple of {PATCH**2}')

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_size(self) -> int:
        """Of latents; that of config.json is of tokens which are packed already."""
        return PATCH

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which diffusers reads too."""
        return {
            **_FIXED,
            **dataclasses.asdict(self),
            'axes_dims_rope': list(self.axes_dims_rope),
        }


# What FLUX.1-dev and Kontext have.
_FIXED = {
    '_class_name': 'FluxTransformer2DModel',
    'guidance_embeds': True,
    'out_channels': None,  # as many as in_channels; the models for filling and depth have more in
    'patch_size': 1,  # tokens are packed before the transformer as diffusers cuts it
}
_ASSUMED = {'axes_dims_rope': [16, 56, 56], 'guidance_embeds': False}  # where a file does not say
# What changes no number.
_IGNORED = {'_diffusers_version', '_name_or_path'}


def read_config(directory: str | pathlib.Path) -> FluxConfig:
    """From the config.json of a transformer as diffusers publishes it."""
    with config_json(directory, 'a FLUX transformer') as said:
        values = {**_ASSUMED, **said}
        if values.get('out_channels') == values['in_channels']:
            values['out_channels'] = None
        values['axes_dims_rope'] = tuple(values['axes_dims_rope'])
        config = sizes_of(FluxConfig, values)
        guided = values.pop('guidance_embeds')
        schnell = () if guided is True else (f'guidance_embeds is {guided!r}: {SCHNELL}',)
        supported = config.to_json() | {'axes_dims_rope': config.axes_dims_rope}
        check_fields(values, supported, _IGNORED, schnell)
    return config


SCHNELL = 'this is FLUX.1-schnell, only FLUX.1-dev and FLUX.1-Kontext-dev are supported'


# ------------------------------------------------------------ positions


def picture_ids(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """(S, 3): a token of the i-th picture is at (i, row, column); the target is the picture 0."""
    ids = [
        [(i, row, col) for row in range(h) for col in range(w)] for i, (h, w) in enumerate(grids)
    ]
    return np.concatenate(ids)


def rotation(grids: Sequence[tuple[int, int]], text: int, axes: tuple[int, int, int]) -> Rotation:
    """Of the tokens of pictures on these (h, w) grids, and of `text` tokens after them.

    All text is at (0, 0, 0), where nothing turns. On the host in fp64, as the reference's CPU has
    it.
    """
    ids_S3 = np.concatenate([picture_ids(grids), np.zeros((text, 3))])
    parts = [axis_angles(ids_S3[:, axis], width, THETA) for axis, width in enumerate(axes)]
    angle_Se = np.concatenate(parts, -1)
    return np.cos(angle_Se).astype(np.float32), np.sin(angle_Se).astype(np.float32)


# ------------------------------------------------------------ blocks


class Modulation(nnx.Module):
    """Time's vector -> `parts` vectors (B, 1, D)."""

    def __init__(self, width: int, parts: int, *, rngs: nnx.Rngs):
        self.linear = Linear(width, parts * width, ('embed', 'mlp'), init=normal(0.02), rngs=rngs)
        self.parts = parts

    def __call__(self, time_BD) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(time_BD))[:, None], self.parts, -1)


def _qkv(x_BSD, to_q, to_k, to_v, norm_q, norm_k, heads: int) -> tuple[jax.Array, ...]:
    q, k, v = (split_heads(project(x_BSD), heads) for project in (to_q, to_k, to_v))
    return norm_q(q), norm_k(k), v


def _attend(q_BSNE, k_BSNE, v_BSNE, rotation: Rotation, length_B) -> jax.Array:
    q, k = rotate_pairs(q_BSNE, *rotation), rotate_pairs(k_BSNE, *rotation)
    return merge_heads(attend(q, k, v_BSNE, length_B=length_B))


class Attention(nnx.Module):
    """Of all tokens with the same weights; its output goes to the block's proj_out."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        D, E = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        linear = functools.partial(Linear, D, D, ('embed', 'heads'), rngs=rngs)
        self.to_q, self.to_k, self.to_v = (linear() for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(E, EPS), RmsNorm(E, EPS)

    def __call__(self, x_BSD, rotation: Rotation, length_B) -> jax.Array:
        norms = self.norm_q, self.norm_k
        q, k, v = _qkv(x_BSD, self.to_q, self.to_k, self.to_v, *norms, self.heads)
        return _attend(q, k, v, rotation, length_B)


class JointAttention(nnx.Module):
    """Pictures and text look at all of both; `add` stands for text."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        D, E = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        linear = functools.partial(Linear, D, D, ('embed', 'heads'), rngs=rngs)
        self.to_q, self.to_k, self.to_v = (linear() for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (linear() for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(E, EPS), RmsNorm(E, EPS)
        self.norm_added_q, self.norm_added_k = RmsNorm(E, EPS), RmsNorm(E, EPS)
        self.to_out = Linear(D, D, ('heads', 'embed'), rngs=rngs)
        self.to_add_out = Linear(D, D, ('heads', 'embed'), rngs=rngs)

    def __call__(
        self, x_BSD, text_BLD, rotation: Rotation, length_B
    ) -> tuple[jax.Array, jax.Array]:
        norms = self.norm_q, self.norm_k
        ours = _qkv(x_BSD, self.to_q, self.to_k, self.to_v, *norms, self.heads)
        norms, add = (self.norm_added_q, self.norm_added_k), (self.add_q_proj, self.add_k_proj)
        texts = _qkv(text_BLD, *add, self.add_v_proj, *norms, self.heads)
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(ours, texts, strict=True))
        y = _attend(q, k, v, rotation, length_B)
        S = x_BSD.shape[1]
        return self.to_out(y[:, :S]), self.to_add_out(y[:, S:])


class DoubleStreamBlock(nnx.Module):
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.norm1 = Modulation(D, 6, rngs=rngs)
        self.norm1_context = Modulation(D, 6, rngs=rngs)
        self.attn = JointAttention(config, rngs=rngs)
        self.ff = Mlp(D, MLP_RATIO * D, D, rngs=rngs)
        self.ff_context = Mlp(D, MLP_RATIO * D, D, rngs=rngs)

    def __call__(
        self, x_BSD, text_BLD, time_BD, rotation: Rotation, length_B
    ) -> tuple[jax.Array, jax.Array]:
        x, text = (constrain(a, BATCH_AXES, None, None) for a in (x_BSD, text_BLD))
        shift, scale, gate, shift_f, scale_f, gate_f = self.norm1(time_BD)
        c_shift, c_scale, c_gate, c_shift_f, c_scale_f, c_gate_f = self.norm1_context(time_BD)
        y, y_text = self.attn(
            modulate(layer_norm(x, EPS), shift, scale),
            modulate(layer_norm(text, EPS), c_shift, c_scale),
            rotation,
            length_B,
        )
        x, text = x + gate * y, text + c_gate * y_text
        x = x + gate_f * self.ff(modulate(layer_norm(x, EPS), shift_f, scale_f))
        y_text = self.ff_context(modulate(layer_norm(text, EPS), c_shift_f, c_scale_f))
        return x, text + c_gate_f * y_text


class SingleStreamBlock(nnx.Module):
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        D, hidden = config.width, MLP_RATIO * config.width
        self.norm = Modulation(D, 3, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.proj_mlp = Linear(D, hidden, ('embed', 'mlp'), rngs=rngs)
        self.proj_out = Linear(D + hidden, D, ('mlp', 'embed'), rngs=rngs)

    def __call__(self, x_BSD, time_BD, rotation: Rotation, length_B) -> jax.Array:
        x = constrain(x_BSD, BATCH_AXES, None, None)
        shift, scale, gate = self.norm(time_BD)
        y = modulate(layer_norm(x, EPS), shift, scale)
        hidden = ACTIVATIONS['gelu_tanh'](self.proj_mlp(y))
        attended = self.attn(y, rotation, length_B)
        return x + gate * self.proj_out(jnp.concatenate([attended, hidden], -1))


class TimeTextEmbed(nnx.Module):
    """The vector that modulates: time, guidance and the prompt as a whole."""

    def __init__(self, width: int, pooled: int, *, rngs: nnx.Rngs):
        mlp = functools.partial(Mlp, activation='silu', init=normal(0.02), rngs=rngs)
        self.timestep_embedder = mlp(CHANNELS, width, width)
        self.guidance_embedder = mlp(CHANNELS, width, width)
        self.text_embedder = mlp(pooled, width, width)

    def __call__(self, t_B, guidance_B, pooled_BD, dtype) -> jax.Array:
        time = self.timestep_embedder(sinusoid(1000 * t_B).astype(dtype))
        guidance = self.guidance_embedder(sinusoid(1000 * guidance_B).astype(dtype))
        return time + guidance + self.text_embedder(pooled_BD.astype(dtype))


# ------------------------------------------------------------ the whole


@struct.dataclass
class FluxExtra:
    context_BhwD: tuple[jax.Array, ...]  # tokens of the context images, each on its own grid
    guidance_B: Array
    pooled_BD: Array


class Flux(Backbone):
    takes_context = True

    def __init__(self, config: FluxConfig, *, remat: str, dtype, rngs: nnx.Rngs):
        D = config.width
        self.config, self.remat, self.dtype = config, remat, dtype
        self.width, self.patch = D, PATCH
        self.latent_channels = config.in_channels // PATCH**2
        self.context_width = config.joint_attention_dim
        self.pooled_width = config.pooled_projection_dim
        self.x_embedder = Linear(config.in_channels, D, ('channels', 'embed'), rngs=rngs)
        self.context_embedder = Linear(self.context_width, D, (None, 'embed'), rngs=rngs)
        self.time_text_embed = TimeTextEmbed(D, config.pooled_projection_dim, rngs=rngs)
        self.transformer_blocks = stack(
            lambda rngs: DoubleStreamBlock(config, rngs=rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stack(
            lambda rngs: SingleStreamBlock(config, rngs=rngs), config.num_single_layers, rngs
        )
        self.norm_out = Modulation(D, 2, rngs=rngs)
        self.proj_out = Linear(D, config.in_channels, ('embed', 'channels'), init=zeros, rngs=rngs)

    def patchify(self, z_BTHWC, visual: Visual) -> Patches:
        assert visual.guidance_B is not None, 'FLUX wants guidance'
        assert visual.pooled_BD is not None, "FLUX wants CLIP's vector"
        context = tuple(self._embed(z_BHWC) for z_BHWC in visual.context_images)
        return Patches(
            target_BThwD=self._embed(z_BTHWC[:, 0])[:, None],  # pictures: one latent frame
            extra=FluxExtra(context, visual.guidance_B, visual.pooled_BD),
        )

    def _embed(self, z_BHWC) -> jax.Array:
        pattern = 'B (h p) (w q) C -> B h w (C p q)'
        return self.x_embedder(rearrange(z_BHWC.astype(self.dtype), pattern, p=PATCH, q=PATCH))

    def velocity(self, patches, t_BT, context_BLD, context_length_B) -> jax.Array:
        target_BhwD, extra = patches.target_BThwD[:, 0], patches.extra
        pictures = (target_BhwD, *extra.context_BhwD)
        x = jnp.concatenate([rearrange(a, 'B h w D -> B (h w) D') for a in pictures], 1)
        text = self.context_embedder(context_BLD.astype(self.dtype))
        time = self.time_text_embed(t_BT[:, 0], extra.guidance_B, extra.pooled_BD, self.dtype)
        # The reference has text first. Attention does not know the order of tokens, only where they
        # are; with text last, padding is at the end and a length keeps it out, without a mask.
        grids = [(a.shape[1], a.shape[2]) for a in pictures]
        where = rotation(grids, text.shape[1], self.config.axes_dims_rope)
        length_B = x.shape[1] + context_length_B
        x, text = fold(
            self.transformer_blocks,
            (x, text),
            lambda block, streams: block(*streams, time, where, length_B),
            remat=self.remat,
        )
        x = fold(
            self.single_transformer_blocks,
            jnp.concatenate([x, text], 1),
            lambda block, x: block(x, time, where, length_B),
            remat=self.remat,
        )
        h, w = grids[0]
        scale, shift = self.norm_out(time)  # scale first, unlike in the blocks
        x = self.proj_out(modulate(layer_norm(x[:, : h * w], EPS), shift, scale))
        pattern = 'B (h w) (C p q) -> B 1 (h p) (w q) C'
        return rearrange(x, pattern, h=h, p=PATCH, q=PATCH).astype(jnp.float32)
