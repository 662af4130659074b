"""CLIP's text model, whose pooled state is FLUX's second text input (arXiv 2103.00020).

Names are those of transformers' CLIPTextModel. Each layer:
    x += Attention(norm(x))         causal
    x += Mlp(norm(x))
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal
from metacanvas_jax.layers.mlp import Mlp
from metacanvas_jax.layers.norm import LayerNorm
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.text_encoders.base import PooledEncoder
from metacanvas_jax.types import InputError, Texts

init = normal(0.02)
NO_EOS = 2  # in configs older than their tokenizer's true end of text


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Under the names of the published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    eos_token_id: int
    layer_norm_eps: float

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise InputError(f'{field.name} {value!r} is no positive integer')
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f'hidden_size {self.hidden_size} is no multiple of num_attention_heads '
                f'{self.num_attention_heads}'
            )

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which transformers reads too."""
        return {'architectures': ['CLIPTextModel'], **_FIXED, **dataclasses.asdict(self)}


class Attention(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        linear = functools.partial(Linear, width, width, init=init, rngs=rngs)
        self.q_proj = linear(('embed', 'heads'))
        self.k_proj = linear(('embed', 'heads'))
        self.v_proj = linear(('embed', 'heads'))
        self.out_proj = linear(('heads', 'embed'))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(layer(x_BLD), self.heads) for layer in projections)
        return self.out_proj(merge_heads(attend(q, k, v, causal=True)))


class Layer(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, width, activation='quick_gelu', init=init, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x_BLD = constrain(x_BLD, BATCH_AXES, None, None)
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class Clip(PooledEncoder):
    """Frozen wherever it is used: nothing of a layer is kept for a backward pass."""

    def __init__(self, config: ClipConfig, *, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.width = width = config.hidden_size
        tokens = init(rngs.params(), (config.vocab_size, width))
        places = init(rngs.params(), (config.max_position_embeddings, width))
        self.token_embedding = nnx.Param(tokens, axes=('vocab', 'embed'))
        self.position_embedding = nnx.Param(places, axes=(None, 'embed'))
        self.layers = stack(lambda rngs: Layer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.final_layer_norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, ids_BL) -> tuple[jax.Array, jax.Array]:
        """States (B, L, D) after the last norm, and that of the end of the text (B, D).

        No token sees padding on its right.
        """
        L, most = ids_BL.shape[1], self.config.max_position_embeddings
        assert most >= L, f'CLIP reads {most} tokens, got {L}'
        x_BLD = self.token_embedding[...][ids_BL] + self.position_embedding[:L]
        x_BLD = fold(self.layers, x_BLD.astype(self.dtype), lambda layer, x: layer(x), remat='none')
        x_BLD = self.final_layer_norm(x_BLD)
        end_B11 = end_of_text(jnp.asarray(ids_BL), self.config.eos_token_id)[:, None, None]
        return x_BLD, jnp.take_along_axis(x_BLD, end_B11, 1)[:, 0]

    def pool(self, texts: Texts) -> jax.Array:
        assert texts.pooled is not None
        return self(texts.pooled.ids_BU)[1]


def end_of_text(ids_BL: jax.Array, eos: int) -> jax.Array:
    """The first end of text (B,); padding may be more of them.

    Trap: a published `eos_token_id` of 2 is wrong, and stands for the largest id of the text.
    """
    return jnp.argmax(ids_BL if eos == NO_EOS else ids_BL == eos, 1)


# ---------------------------------------------------------------- config.json

# Fields with the one meaning that is written here; left out, they have it.
_FIXED: dict[str, Any] = {'model_type': 'clip_text_model', 'hidden_act': 'quick_gelu'}
# What else a config.json may hold: nothing that changes the states.
_IGNORED = {
    *('_name_or_path', 'architectures', 'transformers_version', 'torch_dtype', 'dtype'),
    *('attention_dropout', 'dropout', 'initializer_factor', 'initializer_range'),  # of training
    *('bos_token_id', 'pad_token_id'),  # the tokenizer's
    'projection_dim',  # of a head beside the text model
}


def read_config(directory: str | pathlib.Path) -> ClipConfig:
    """From the config.json of a CLIPTextModel."""
    with config_json(directory, 'a CLIP text model') as values:
        config = sizes_of(ClipConfig, values)
        check_fields(values, _FIXED, _IGNORED | dataclasses.asdict(config).keys())
    return config
