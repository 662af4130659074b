"""The straight path between data and noise (App. A.2), and the direction of time.

z_t = (1 - t) z + t eps,    u = dz_t/dt = eps - z,    t = 0 is data, t = 1 is noise.
"""

import jax


def noised(z_BTHWC, eps_BTHWC, t_BT) -> tuple[jax.Array, jax.Array]:
    """z_t and the velocity u to be learned."""
    t = t_BT[:, :, None, None, None]
    return (1 - t) * z_BTHWC + t * eps_BTHWC, eps_BTHWC - z_BTHWC


def frame_times(t_B, clean_BT) -> jax.Array:
    """One time per latent frame: clean frames are at 0 (App. E)."""
    return t_B[:, None] * (1 - clean_BT)
