"""Solvers integrate any velocity(z, t) from t = 1 (noise) to t = 0 (data)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def euler(velocity: Callable, z_1: jax.Array, times: jax.Array) -> jax.Array:
    """z <- z + (t' - t) velocity(z, t) along `times`."""

    def step(z, pair):
        t, t_next = pair
        return z + (t_next - t) * velocity(z, t), None

    return jax.lax.scan(step, z_1, jnp.stack([times[:-1], times[1:]], 1))[0]
