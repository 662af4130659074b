"""The encoders of T5 v1.1 and UMT5, whose states are FLUX's and Wan's text (arXiv 1910.10683).

Names are those of transformers' T5EncoderModel. Each block:
    x += Attention(norm(x))         softmax(q k^T + bias) v, the bias by the distance of tokens
    x += GeGlu(norm(x))

T5 learns one table of biases for all blocks, UMT5 (arXiv 2304.09151) one for each.
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
from metacanvas_jax.layers.attention import attend_biased, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, normal
from metacanvas_jax.layers.mlp import ACTIVATIONS
from metacanvas_jax.layers.norm import RmsNorm
from metacanvas_jax.layers.stack import scan, stack
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.text_encoders.base import TextEncoder
from metacanvas_jax.types import EncoderPrompt, EncoderStates, InputError


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Under the names of the published config.json."""

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int  # of a head; not d_model / num_heads
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float

    def __post_init__(self):
        if self.model_type not in BIASES:
            names = ', '.join(BIASES)
            raise InputError(f'model_type {self.model_type!r} is unknown; there are: {names}')
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise InputError(f'{field.name} {value!r} is no positive integer')
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or self.relative_attention_max_distance <= buckets // 4:
            raise InputError(
                f'{buckets} relative_attention_num_buckets for a relative_attention_max_distance '
                f'of {self.relative_attention_max_distance}: want 4 or more, and a distance above '
                'a quarter of them'
            )

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which transformers reads too."""
        return {
            'architectures': [f'{self.model_type.upper()}EncoderModel'],
            **_FIXED,
            **dataclasses.asdict(self),
            'tie_word_embeddings': False,
        }


# ---------------------------------------------------------------- biases of distances


def bucket(distance: int, buckets: int, furthest: int) -> int:
    """Which of the table's rows is for a key that stands `distance` tokens after the query.

    Half of the rows are for keys after it. Of each half the first half is for one distance each,
    the rest for intervals that grow with the logarithm up to `furthest`; the last is for all above.
    In integers, as logarithms round: n log(d / m) / log(M / m) >= k is d^n m^k >= M^k m^n.
    """
    half, d, M = buckets // 2, abs(distance), furthest
    m = half // 2
    n = half - m
    far = sum(d**n * m**k >= M**k * m**n for k in range(1, n))
    return half * (distance > 0) + (d if d < m else m + far)


class SharedBias(nnx.Module):
    """One table for all layers."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.table = nnx.Param(_table(config, rngs), axes=(None, 'heads'))
        self.layers = config.num_layers

    def tables(self) -> jax.Array:
        table_bN = self.table[...]
        return jnp.broadcast_to(table_bN, (self.layers, *table_bN.shape))


class LayerBias(nnx.Module):
    """A table for each layer."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        tables = [_table(config, rngs) for _ in range(config.num_layers)]
        self.table = nnx.Param(jnp.stack(tables), axes=(None, 'heads'))

    def tables(self) -> jax.Array:
        return self.table[...]


def _table(config: T5Config, rngs: nnx.Rngs) -> jax.Array:
    shape = config.relative_attention_num_buckets, config.num_heads
    return normal(config.d_model**-0.5)(rngs.params(), shape)


# config.model_type -> its biases
BIASES = {'t5': SharedBias, 'umt5': LayerBias}


def spread(table_bN, buckets_of: np.ndarray, length: int) -> jax.Array:
    """The bias (N, S, L) of every query and key; `buckets_of` the distances from 1 - length on."""
    place_L = jnp.arange(length)
    distance_SL = place_L - place_L[:, None]
    return table_bN.T[:, buckets_of][:, distance_SL + length - 1]


# ---------------------------------------------------------------- layers


class Attention(nnx.Module):
    """Without biases of projections and without a scale, which T5 keeps in its weights."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, E = config.d_model, config.d_kv
        inner = config.num_heads * E
        linear = functools.partial(Linear, bias=False, rngs=rngs)
        self.q = linear(width, inner, ('embed', 'heads'), init=normal((width * E) ** -0.5))
        self.k = linear(width, inner, ('embed', 'heads'), init=normal(width**-0.5))
        self.v = linear(width, inner, ('embed', 'heads'), init=normal(width**-0.5))
        self.o = linear(inner, width, ('heads', 'embed'), init=normal(inner**-0.5))
        self.heads = config.num_heads

    def __call__(self, x_BLD, bias_NLL, length_B) -> jax.Array:
        q, k, v = (split_heads(layer(x_BLD), self.heads) for layer in (self.q, self.k, self.v))
        return self.o(merge_heads(attend_biased(q, k, v, bias_NSL=bias_NLL, length_B=length_B)))


class GeGlu(nnx.Module):
    """wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=False, rngs=rngs)
        self.wi_0 = linear(width, hidden, ('embed', 'mlp'), init=normal(width**-0.5))
        self.wi_1 = linear(width, hidden, ('embed', 'mlp'), init=normal(width**-0.5))
        self.wo = linear(hidden, width, ('mlp', 'embed'), init=normal(hidden**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        # In fp16 wo would overflow, so transformers keeps it in fp32 then; bf16 reaches as far.
        return self.wo(ACTIVATIONS['gelu_tanh'](self.wi_0(x)) * self.wi_1(x))


class Block(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = GeGlu(config.d_model, config.d_ff, rngs=rngs)

    def __call__(self, x_BLD, bias_NLL, length_B) -> jax.Array:
        x_BLD = constrain(x_BLD, BATCH_AXES, None, None)
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), bias_NLL, length_B)
        return x_BLD + self.feed_forward(self.feed_forward_norm(x_BLD))


class T5(TextEncoder):
    """Frozen wherever it is used: nothing of a layer is kept for a backward pass."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        table = normal(1.0)(rngs.params(), (config.vocab_size, config.d_model))
        self.shared = nnx.Param(table, axes=('vocab', 'embed'))
        self.relative_attention_bias = BIASES[config.model_type](config, rngs=rngs)
        self.block = stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.final_layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, ids_BL, length_B) -> jax.Array:
        """States (B, L, D) after the last norm; no token sees padding, whose states are zero.

        transformers computes states for padding too; Wan makes them zero afterwards.
        """
        x_BLD = self.shared[...][ids_BL].astype(self.dtype)
        L, config = x_BLD.shape[1], self.config
        buckets_of = np.array(
            [
                bucket(
                    distance,
                    config.relative_attention_num_buckets,
                    config.relative_attention_max_distance,
                )
                for distance in range(1 - L, L)
            ]
        )

        def step(block, x_BLD, table_bN):
            return block(x_BLD, spread(table_bN, buckets_of, L), length_B), None

        tables = self.relative_attention_bias.tables()
        x_BLD = self.final_layer_norm(scan(self.block, x_BLD, step, tables, remat='none')[0])
        valid_BL = jnp.arange(L) < jnp.asarray(length_B)[:, None]
        return jnp.where(valid_BL[..., None], x_BLD, 0)

    def context(self, prompt: EncoderPrompt) -> EncoderStates:
        """What the DiT gets of a prompt."""
        states_BUD = self(prompt.ids_BU, prompt.length_B)
        taken_BL1 = jnp.asarray(prompt.taken_BL)[..., None]
        states_BLD = jnp.take_along_axis(states_BUD, taken_BL1, 1)
        return EncoderStates(states_BLD=states_BLD, length_B=prompt.context_length_B)


# ---------------------------------------------------------------- config.json

# Fields with the one meaning that is written here; left out, they have it.
_FIXED: dict[str, Any] = {
    'feed_forward_proj': 'gated-gelu',
    'dense_act_fn': 'gelu_new',
    'is_gated_act': True,
    'is_decoder': False,
}
# What else a config.json may hold: nothing that changes the encoder's states.
_IGNORED = {
    *('_name_or_path', 'architectures', 'transformers_version', 'torch_dtype', 'dtype'),
    # of the decoder, and of the whole model's heads
    *('is_encoder_decoder', 'num_decoder_layers', 'decoder_start_token_id', 'output_past'),
    *('use_cache', 'scale_decoder_outputs', 'tie_word_embeddings', 'classifier_dropout'),
    # of training, from scratch or not
    *('dropout_rate', 'initializer_factor', 'task_specific_params'),
    # the tokenizer's; T5 has no positions of its own, so none is the last
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'tokenizer_class', 'n_positions'),
    # of UMT5's first implementation; transformers has never read it
    'scalable_attention',
}


def read_config(directory: str | pathlib.Path) -> T5Config:
    """From the config.json of a T5 v1.1 or UMT5."""
    # What transformers assumes where a file does not say it.
    unsaid = dict(
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
    )
    with config_json(directory, 'a T5') as said:
        values = unsaid | said
        if values.get('model_type') == 't5':
            values.setdefault('feed_forward_proj', 'relu')  # the first T5's, before v1.1
        config = sizes_of(T5Config, values)
        check_fields(values, _FIXED, _IGNORED | dataclasses.asdict(config).keys())
    return config
