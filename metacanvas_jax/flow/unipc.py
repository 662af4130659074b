"""UniPC of second order with B(h) = e^h - 1 (arXiv 2302.04867): DPM-Solver++ 2M and a corrector.

    x = z - sigma velocity(z, t)                                  the data that is foreseen
    y <- s y + (1 - s) (x_ + a (x_ - x__) + b (x - x_))           UniC: what z ought to have been
    z <- r y + (1 - r) (x + c (x - x_))                           UniP
Strokes count steps back. s and r are the ratios of this sigma and of the next one to the one before
it. With g, h, k the steps of log((1 - sigma) / sigma) before the last, the last and the next:
    c = k / 2h        p = 1 / (1 - e^-h) - 1 / h        q = (2p - 1) / (g + h)
    a = q h / g       b = p - q
The first step corrects nothing and has no x_, the second no x__; the last has an endless k. Orders
are lower there: s = 1, c = 0; a = 0, b = 1/2; c = 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from metacanvas_jax.flow.times import shifted


@struct.dataclass
class UniPcTimes:
    """N + 1 sigmas down to 0; for the N steps, the times that the model is told and a, b, c."""

    sigma: jax.Array
    told: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array


def unipc_schedule(steps: int, shift: float) -> UniPcTimes:
    """As diffusers' UniPCMultistepScheduler with flow sigmas, whose models are told whole numbers.

    On the host in fp64: p and q are small differences.
    """
    sigma = shifted(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift)
    sigma[0] -= 1e-6  # the logarithm of 1 - sigma wants it
    told = np.trunc(1000 * sigma) / 1000
    sigma = np.float32(sigma).astype(np.float64)
    log_ratio = np.log(1 - sigma) - np.log(sigma)
    h = np.diff(log_ratio)  # h[i] leads to step i + 1
    a, b, c = np.zeros((3, steps))
    b[1:2] = 0.5
    p = 1 / -np.expm1(-h[1:]) - 1 / h[1:]
    q = (2 * p - 1) / (h[:-1] + h[1:])
    a[2:], b[2:] = q * h[1:] / h[:-1], p - q
    c[1:-1] = h[1:] / (2 * h[:-1])
    values = (np.append(sigma, 0), told, a, b, c)
    return UniPcTimes(*(jnp.asarray(value, jnp.float32) for value in values))


def unipc(velocity, z_1: jax.Array, times: UniPcTimes) -> jax.Array:
    r = times.sigma[1:] / times.sigma[:-1]
    s = jnp.concatenate([jnp.ones(1), r[:-1]])  # 1: the noise is not corrected

    def step(carry, at):
        z, y, x_1, x_2 = carry
        sigma, t, s, a, b, r, c = at
        x = z - sigma * velocity(z, t)
        y = s * y + (1 - s) * (x_1 + a * (x_1 - x_2) + b * (x - x_1))
        z = r * y + (1 - r) * (x + c * (x - x_1))
        return (z, y, x, x_1), None

    start = z_1, z_1, jnp.zeros_like(z_1), jnp.zeros_like(z_1)
    along = times.sigma[:-1], times.told, s, times.a, times.b, r, times.c
    return jax.lax.scan(step, start, along)[0][0]
