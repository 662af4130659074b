"""The context connector: MLLM states to the DiT's text interface (Sec. 3.2, App. D.1)."""

import jax
from flax import nnx

from metacanvas_jax.canvas.config import ContextConfig
from metacanvas_jax.layers.dropout import dropout
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.mlp import ACTIVATIONS


class ContextConnector(nnx.Module):
    """Linear, activation, dropout, Linear."""

    def __init__(self, config: ContextConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.up = Linear(d_in, config.hidden, ('embed', 'mlp'), rngs=rngs)
        self.down = Linear(config.hidden, d_out, ('mlp', 'embed'), rngs=rngs)
        self.activation, self.dropout = config.activation, config.dropout
        self.skip = config.skip

    def __call__(self, states_BLD, length_B, key: jax.Array | None):
        """Context and its true lengths; `key` turns dropout on (training)."""
        hidden = ACTIVATIONS[self.activation](self.up(states_BLD[:, self.skip :]))
        return self.down(dropout(hidden, self.dropout, key)), length_B - self.skip
