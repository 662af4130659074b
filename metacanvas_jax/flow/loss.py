"""Mean squared error of the velocity, over noised frames only."""

import jax
import jax.numpy as jnp


def flow_loss(v_BTHWC, u_BTHWC, clean_BT) -> jax.Array:
    """Clean frames have no part in it, nor in the mean."""
    weight = (1 - clean_BT)[:, :, None, None, None].astype(jnp.float32)
    error = jnp.square(v_BTHWC.astype(jnp.float32) - u_BTHWC.astype(jnp.float32))
    size = v_BTHWC[0, 0].size
    return jnp.sum(weight * error) / (jnp.sum(weight) * size)
