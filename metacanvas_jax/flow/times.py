"""Which times are drawn in training and visited in sampling."""

import jax
import jax.numpy as jnp


def shifted(t, shift: float):
    """t' = s t / (1 + (s - 1) t): pushed towards noise for s > 1, unchanged for s = 1."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(key, batch: int, shift: float) -> jax.Array:
    """t ~ U(0, 1), shifted, one per sample (App. A.2 has s = 1)."""
    return shifted(jax.random.uniform(key, (batch,)), shift)


def schedule(steps: int, shift: float) -> jax.Array:
    """steps + 1 shifted times from 1 to 0."""
    return shifted(jnp.linspace(1.0, 0.0, steps + 1), shift)
