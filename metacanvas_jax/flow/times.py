"""Which times are drawn in training and visited in sampling."""

import jax
import jax.numpy as jnp


def uniform(key, batch: int) -> jax.Array:
    """t ~ U(0, 1), one per sample (App. A.2)."""
    return jax.random.uniform(key, (batch,))


def schedule(steps: int, shift: float) -> jax.Array:
    """steps + 1 times from 1 to 0, pushed towards noise by t' = s t / (1 + (s - 1) t)."""
    t = jnp.linspace(1.0, 0.0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)
