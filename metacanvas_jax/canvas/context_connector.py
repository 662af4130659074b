"""What the DiT's text interface gets (Sec. 3.2, App. B.1 and D.1).

ContextConnector    states of the MLLM, through an MLP
EncoderText         states of the base system's own text encoder, as they are
NoText              nothing: the DiT reads queries alone
"""

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.canvas.config import ContextConfig
from metacanvas_jax.canvas.queries import MetaQueries, NoQueries
from metacanvas_jax.layers.dropout import dropout
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.mlp import ACTIVATIONS
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Readings


class ContextConnector(nnx.Module):
    """Linear, activation, dropout, Linear."""

    def __init__(self, config: ContextConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.up = Linear(d_in, config.hidden, ('embed', 'mlp'), rngs=rngs)
        self.down = Linear(config.hidden, d_out, ('mlp', 'embed'), rngs=rngs)
        self.activation, self.dropout = config.activation, config.dropout
        self.skip = config.skip

    def __call__(self, states_BLD, length_B, key: jax.Array | None):
        """Context and its true lengths; `key` turns dropout on (training)."""
        hidden_BLD = ACTIVATIONS[self.activation](self.up(states_BLD[:, self.skip :]))
        # Drawn token by token, so that padding, which differs between meshes, changes no draw.
        hidden_LBD = dropout(jnp.swapaxes(hidden_BLD, 0, 1), self.dropout, key)
        return self.down(jnp.swapaxes(hidden_LBD, 0, 1)), length_B - self.skip

    def read(self, readings: Readings, key: jax.Array | None):
        assert readings.prompt is not None
        return self(readings.states_BLD, readings.prompt.length_B, key)


class EncoderText(nnx.Module):
    def read(self, readings: Readings, key: jax.Array | None):
        del key
        assert readings.encoder is not None
        return readings.encoder.states_BLD, readings.encoder.length_B


class NoText(nnx.Module):
    def __init__(self, d_out: int):
        self.width = d_out

    def read(self, readings: Readings, key: jax.Array | None):
        del key
        assert readings.prompt is not None
        batch = len(readings.prompt.length_B)
        return jnp.zeros((batch, 0, self.width)), jnp.zeros(batch, jnp.int32)


class Context(nnx.Module):
    """Queries, then text: padding stays at the end, and SANA's cross-attention knows no order."""

    def __init__(
        self, text: ContextConnector | EncoderText | NoText, queries: MetaQueries | NoQueries
    ):
        self.text, self.queries = text, queries

    def __call__(self, mllm: Qwen | None, readings: Readings, key: jax.Array | None):
        """(B, L, D) and true lengths."""
        text_key, query_key = (None, None) if key is None else jax.random.split(key)
        text_BLD, length_B = self.text.read(readings, text_key)
        return self.queries.prepend(text_BLD, length_B, mllm, readings, query_key)
