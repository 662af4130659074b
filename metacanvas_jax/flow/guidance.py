"""Classifier-free guidance as a wrapper around a velocity."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def guided(velocity: Callable, condition, negative, scale) -> Callable:
    """velocity(z, t, plan) -> velocity(z, t): v_neg + scale (v_cond - v_neg).

    Both branches run as one batch. Scale 1 is the condition alone: call `velocity` itself.
    """
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, negative)

    def wrapped(z, t):
        v_cond, v_neg = jnp.split(velocity(jnp.concatenate([z, z]), t, both), 2)
        return v_neg + scale * (v_cond - v_neg)

    return wrapped
