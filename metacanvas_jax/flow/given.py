"""Given latent frames in sampling: the velocity sees them clean, and no solver moves them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metacanvas_jax.flow.path import frame_times


def impose(z_BTHWC, given_BTHWC, clean_BT) -> jax.Array:
    """The latents with the given frames in their places; before the first step, after the last."""
    return jnp.where(_frames(clean_BT), given_BTHWC, z_BTHWC)


def holding(velocity: Callable, given_BTHWC, clean_BT) -> Callable:
    """velocity(z, t_BT, *plan) -> velocity(z, t, *plan), 0 on given frames, whose time is 0.

    `z` may hold the batch several times over, as that of `guided` does.
    """

    def wrapped(z, t, *plan):
        times = len(z) // len(clean_BT)
        given, clean = (jnp.concatenate([a] * times) for a in (given_BTHWC, clean_BT))
        t_BT = frame_times(jnp.full(len(z), t), clean)
        v = velocity(impose(z, given, clean), t_BT, *plan)
        return jnp.where(_frames(clean), 0, v)

    return wrapped


def _frames(clean_BT) -> jax.Array:
    return clean_BT[:, :, None, None, None] > 0
