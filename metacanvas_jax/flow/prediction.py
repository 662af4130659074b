"""What the network's output means. The objective and the solver only ever see a velocity.

    velocity  v = output                      SANA, FLUX, Wan, and every experiment of the paper
    data      v = (z_t - output) / t          the output is the clean latent

In pixel space a patch holds more noise than a narrow network can carry from its input to its output,
which a velocity asks of it (arXiv 2511.13720); clean patches lie on something much smaller.
"""

import jax
import jax.numpy as jnp

LEAST_TIME = 0.05  # below it the division would only amplify errors


def velocity(output: jax.Array, z_BTHWC, t_BT) -> jax.Array:
    del z_BTHWC, t_BT
    return output


def data(output: jax.Array, z_BTHWC, t_BT) -> jax.Array:
    t = jnp.maximum(t_BT, LEAST_TIME)[:, :, None, None, None]
    return (z_BTHWC - output) / t


PREDICTIONS = {'velocity': velocity, 'data': data}
