"""Gemma-2, whose states are SANA's text (arXiv 2408.00118; names of transformers' Gemma2Model).

Each layer, with norms before and after both of its parts:
    x += norm(Attention(norm(x)))
    x += norm(GeGlu(norm(x)))

Attention is causal with capped logits; every other layer sees a sliding window only.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.layers import rope
from metacanvas_jax.layers.attention import attend_capped, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal
from metacanvas_jax.layers.mlp import ACTIVATIONS
from metacanvas_jax.layers.norm import OffsetRmsNorm
from metacanvas_jax.layers.stack import scan, stack
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.text_encoders.base import TextEncoder
from metacanvas_jax.types import EncoderPrompt, EncoderStates, InputError

SLIDING, FULL = 'sliding_attention', 'full_attention'
init = normal(0.02)


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Under the names of the published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not hidden_size / num_attention_heads
    rms_norm_eps: float
    rope_theta: float
    query_pre_attn_scalar: float
    attn_logit_softcapping: float
    sliding_window: int  # tokens that one sees, itself among them
    layer_types: tuple[str, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not int and field.type is not float:
                continue
            if not isinstance(value, (int, field.type)) or value <= 0:
                raise InputError(f'{field.name} is {value!r}, not a positive number')
        depth, types = self.num_hidden_layers, self.layer_types
        if set(types) - {SLIDING, FULL} or len(types) != depth:
            raise InputError(
                f'layer_types are {list(types)}; want {SLIDING} or {FULL} for {depth} layers'
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f'num_attention_heads {self.num_attention_heads} is not a multiple of '
                f'num_key_value_heads {self.num_key_value_heads}'
            )
        if self.head_dim % 2:
            raise InputError(f'head_dim is {self.head_dim}, an odd number')

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens each layer looks back over."""
        whole = np.iinfo(np.int32).max
        return tuple(self.sliding_window if t == SLIDING else whole for t in self.layer_types)

    def to_json(self) -> dict:
        """The published flat layout, which transformers reads too."""
        values = dataclasses.asdict(self) | {'layer_types': list(self.layer_types)}
        return {'model_type': 'gemma2', 'architectures': ['Gemma2Model'], **values}


PRESETS = {
    'gemma_2_2b': Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        query_pre_attn_scalar=256.0,
        attn_logit_softcapping=50.0,
        sliding_window=4096,
        layer_types=(SLIDING, FULL) * 13,
    )
}


class Attention(nnx.Module):
    """Grouped-query attention without biases."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        width, E = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        linear = functools.partial(Linear, bias=False, init=init, rngs=rngs)
        self.q_proj = linear(width, self.heads * E, ('embed', 'heads'))
        self.k_proj = linear(width, self.kv_heads * E, ('embed', 'kv'))
        self.v_proj = linear(width, self.kv_heads * E, ('embed', 'kv'))
        self.o_proj = linear(self.heads * E, width, ('heads', 'embed'))

    def __call__(self, x_BLD, angles, mask_BLL) -> jax.Array:
        q = rope.rotate_half(split_heads(self.q_proj(x_BLD), self.heads), angles)
        k = rope.rotate_half(split_heads(self.k_proj(x_BLD), self.kv_heads), angles)
        v = split_heads(self.v_proj(x_BLD), self.kv_heads)
        out = attend_capped(q, k, v, scale=self.scale, cap=self.cap, mask_BSL=mask_BLL)
        return self.o_proj(merge_heads(out))


class GeGlu(nnx.Module):
    """down(gelu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=False, init=init, rngs=rngs)
        self.gate_proj = linear(width, hidden, ('embed', 'mlp'))
        self.up_proj = linear(width, hidden, ('embed', 'mlp'))
        self.down_proj = linear(hidden, width, ('mlp', 'embed'))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS['gelu_tanh'](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = OffsetRmsNorm(width, eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = OffsetRmsNorm(width, eps)
        self.pre_feedforward_layernorm = OffsetRmsNorm(width, eps)
        self.mlp = GeGlu(width, config.intermediate_size, rngs=rngs)
        self.post_feedforward_layernorm = OffsetRmsNorm(width, eps)

    def __call__(self, x_BLD, angles, mask_BLL) -> jax.Array:
        x_BLD = constrain(x_BLD, BATCH_AXES, None, None)
        y = self.self_attn(self.input_layernorm(x_BLD), angles, mask_BLL)
        x_BLD = x_BLD + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x_BLD))
        return x_BLD + self.post_feedforward_layernorm(y)


class Gemma2(TextEncoder):
    """Frozen wherever it is used: nothing of a layer is kept for a backward pass."""

    def __init__(self, config: Gemma2Config, *, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        table = init(rngs.params(), (config.vocab_size, config.hidden_size))
        self.embed_tokens = nnx.Param(table, axes=('vocab', 'embed'))
        self.layers = stack(lambda rngs: Layer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = OffsetRmsNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, ids_BL) -> jax.Array:
        # The factor is rounded too, as in the reference: sqrt(4608) is 68 in bf16.
        scale = jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        return self.embed_tokens[...][ids_BL].astype(self.dtype) * scale

    def __call__(self, ids_BL) -> jax.Array:
        """States (B, L, D) after the last norm. No token sees padding on its right."""
        x_BLD = self.embed(ids_BL)
        place_L = jnp.arange(x_BLD.shape[1])
        angles = rope.angles(place_L[None], self.config.head_dim, self.config.rope_theta)
        back_LL = place_L[:, None] - place_L

        def step(layer, x_BLD, window):
            mask_LL = (back_LL >= 0) & (back_LL < window)
            return layer(x_BLD, angles, mask_LL[None]), None

        windows = jnp.asarray(self.config.windows, jnp.int32)
        return self.norm(scan(self.layers, x_BLD, step, windows, remat='none')[0])

    def context(self, prompt: EncoderPrompt) -> EncoderStates:
        """What the DiT gets of a prompt."""
        states_BUD = self(prompt.ids_BU)
        taken_BL1 = jnp.asarray(prompt.taken_BL)[..., None]
        states_BLD = jnp.take_along_axis(states_BUD, taken_BL1, 1)
        return EncoderStates(states_BLD=states_BLD, length_B=prompt.context_length_B)


# ---------------------------------------------------------------- config.json

# What else a config.json may hold: nothing that changes the states.
_IGNORED = {
    *('_name_or_path', 'architectures', 'transformers_version', 'torch_dtype', 'dtype'),
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range', 'attention_dropout'),
    *('use_cache', 'cache_implementation', 'max_position_embeddings', 'tie_word_embeddings'),
    *('final_logit_softcapping', 'hidden_act', 'sliding_window_size', '_attn_implementation'),
    '_attn_implementation_autoset',
}
# Fields with the one meaning that is written here; left out, they have it.
_FIXED: dict[str, Any] = {
    'model_type': 'gemma2',
    'hidden_activation': 'gelu_pytorch_tanh',
    'attention_bias': False,
    'use_bidirectional_attention': False,
    'rope_scaling': None,
    'rope_type': 'default',
}


def read_config(directory: str | pathlib.Path) -> Gemma2Config:
    """From config.json, as published or with transformers 5's `rope_parameters`."""
    with config_json(directory, 'a Gemma-2 model') as values:
        turns = values.pop('rope_parameters', None) or {}
        values |= dict(rope_theta=values.get('rope_theta')) | turns
        values['use_bidirectional_attention'] = bool(values.get('use_bidirectional_attention'))
        default = [FULL if i % 2 else SLIDING for i in range(values['num_hidden_layers'])]
        values['layer_types'] = tuple(values.get('layer_types') or default)
        config = sizes_of(Gemma2Config, values)
        check_fields(values, _FIXED, _IGNORED | dataclasses.asdict(config).keys())
    return config
