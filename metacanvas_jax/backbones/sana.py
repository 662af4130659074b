"""SANA 1.0 and 1.5: a DiT of linear attention and Mix-FFN, without positions (arXiv 2410.10629).

Names are those of diffusers' SanaTransformer2DModel. Each block, for the six modulations of time:
    x += gate * LinearAttention(LN(x) (1 + scale) + shift)
    x += CrossAttention(x, context)
    x += gate * MixFFN(LN(x) (1 + scale) + shift)
SANA 1.5 (arXiv 2501.18427) normalises q and k of both attentions.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.layers.attention import attend, linear_attention, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, LoraConfig, normal, zeros
from metacanvas_jax.layers.mlp import GluMbConv, Mlp
from metacanvas_jax.layers.norm import NoNorm, RmsNorm, layer_norm, modulate
from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.layers.timestep import AdaLayerNormSingle
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import InputError, Patches, Visual

# config.qk_norm -> what all heads of q, and of k, go through as one vector
QK_NORMS = {
    None: lambda width: NoNorm(),
    'rms_norm_across_heads': lambda width: RmsNorm(width, 1e-5),
}


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
    qk_norm: str | None

    def __post_init__(self):
        if self.qk_norm not in QK_NORMS:
            names = ', '.join(map(repr, QK_NORMS))
            raise InputError(f'qk_norm {self.qk_norm!r} is unknown; there are: {names}')
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise InputError(f'{field.name} {value!r} is no positive integer')
        if self.width % self.num_cross_attention_heads:
            raise InputError(
                f'width {self.width} is no multiple of num_cross_attention_heads '
                f'{self.num_cross_attention_heads}'
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which diffusers reads too."""
        return {
            **_FIXED,
            **dataclasses.asdict(self),
            'out_channels': self.in_channels,
            'cross_attention_dim': self.width,
            'cross_attention_head_dim': self.width // self.num_cross_attention_heads,
        }


# What all published models have, and diffusers assumes where a config.json does not say it.
_FIXED = {
    '_class_name': 'SanaTransformer2DModel',
    'attention_bias': False,
    'dropout': 0.0,
    'guidance_embeds': False,  # SANA-Sprint
    'interpolation_scale': None,  # a number would mean positions
    'norm_elementwise_affine': False,
    'norm_eps': 1e-6,
    'timestep_scale': 1.0,
}
# What changes no number.
_IGNORED = {
    '_diffusers_version',
    '_name_or_path',
    'guidance_embeds_scale',  # read with guidance_embeds only
    'sample_size',  # of training; without positions any size is as good
}


def read_config(directory: str | pathlib.Path) -> SanaConfig:
    """From the config.json of a transformer as diffusers publishes it."""
    with config_json(directory, 'a SANA transformer') as said:
        values = {'qk_norm': None, **said}
        values['out_channels'] = values.get('out_channels') or values['in_channels']
        config = sizes_of(SanaConfig, values)
        check_fields(values, config.to_json(), _IGNORED)
    return config


_SANA = SanaConfig(
    in_channels=32,
    num_attention_heads=70,
    attention_head_dim=32,
    num_layers=20,
    num_cross_attention_heads=20,
    caption_channels=2304,
    mlp_ratio=2.5,
    patch_size=1,
    qk_norm=None,
)
# To train from scratch and to trace without weights; with weights their config.json must agree.
PRESETS = {
    'sana_1600m': _SANA,
    'sana1.5_1600m': dataclasses.replace(_SANA, qk_norm='rms_norm_across_heads'),
}


class Projections(nnx.Module):
    """q, k, v and output of one attention."""

    def __init__(
        self,
        width: int,
        *,
        bias: bool,
        qk_norm: str | None,
        lora: LoraConfig | None,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(Linear, width, width, lora=lora, rngs=rngs)
        heads = ('embed', 'heads')
        self.to_q, self.to_k, self.to_v = (linear(heads, bias=bias) for _ in range(3))
        self.to_out = linear(('heads', 'embed'))
        self.norm_q, self.norm_k = QK_NORMS[qk_norm](width), QK_NORMS[qk_norm](width)

    def qkv(self, x_BSD, context_BLD, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = self.norm_q(self.to_q.adapted(x_BSD, None))
        k = self.norm_k(self.to_k.adapted(context_BLD, None))
        v = self.to_v.adapted(context_BLD, None)
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    def out(self, attended_BSNE) -> jax.Array:
        return self.to_out.adapted(merge_heads(attended_BSNE), None)


class SanaBlock(nnx.Module):
    def __init__(self, config: SanaConfig, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        D = config.width
        self.heads, self.cross_heads = config.num_attention_heads, config.num_cross_attention_heads
        attention = functools.partial(Projections, D, qk_norm=config.qk_norm, lora=lora, rngs=rngs)
        self.attn1, self.attn2 = attention(bias=False), attention(bias=True)
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
        attended = linear_attention(*self.attn1.qkv(y, y, self.heads))
        x = x + gate_a * self.attn1.out(attended)

        q, k, v = self.attn2.qkv(x, context_BLD, self.cross_heads)
        x = x + self.attn2.out(attend(q, k, v, length_B=context_length_B))

        y = modulate(layer_norm(x, 1e-6), shift_f, scale_f)
        y = self.ff(rearrange(y, 'B (h w) D -> B h w D', h=h))
        return rearrange(x, 'B (h w) D -> B h w D', h=h) + gate_f[:, :, None] * y


class Sana(Backbone):
    """The LoRA, where there is one, is on the attentions' linear layers (App. B.4)."""

    def __init__(
        self,
        config: SanaConfig,
        *,
        lora: LoraConfig | None = None,
        remat: str,
        dtype,
        rngs: nnx.Rngs,
    ):
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
            lambda rngs: SanaBlock(config, lora, rngs=rngs), config.num_layers, rngs
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
