"""Sinusoidal timesteps and the single shared AdaLN projection of PixArt and SANA."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metacanvas_jax.layers.linear import Linear, normal

CHANNELS = 256


def sinusoid(t, channels: int = CHANNELS) -> jax.Array:
    """[cos(t f), sin(t f)], f_i = 1e4^(-2i / channels), t in 0..1000, in fp32 (cos first).

    The exponents are rounded, as in the reference, but not the exponential: FLUX's guidance reaches
    7000, where the last bit of f moves an angle by 4e-4.
    """
    half = channels // 2
    exponent = np.float32(-np.log(1e4)) * np.arange(half, dtype=np.float32) / half
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = t[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


class AdaLayerNormSingle(nnx.Module):
    """Time -> six modulations (shift, scale, gate of attention, then of the feed-forward)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = normal(0.02)
        self.linear_1 = Linear(CHANNELS, width, ('channels', 'mlp'), init=init, rngs=rngs)
        self.linear_2 = Linear(width, width, ('mlp', 'embed'), init=init, rngs=rngs)
        self.linear = Linear(width, 6 * width, ('embed', 'mlp'), init=init, rngs=rngs)

    def __call__(self, t_B, dtype) -> tuple[jax.Array, jax.Array]:
        """t in 0..1; returns the modulations (B, 6, D) and the embedding (B, D)."""
        hidden = jax.nn.silu(self.linear_1(sinusoid(1000 * t_B).astype(dtype)))
        embedding_BD = self.linear_2(hidden)
        e = self.linear(jax.nn.silu(embedding_BD))
        return e.reshape(len(e), 6, -1), embedding_BD
