"""Which times are drawn in training and visited in sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def shifted(t, shift: float):
    """t' = s t / (1 + (s - 1) t): pushed towards noise for s > 1, unchanged for s = 1."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(key, batch: int, shift: float) -> jax.Array:
    """t ~ U(0, 1), shifted, one per sample (App. A.2 has s = 1)."""
    return shifted(jax.random.uniform(key, (batch,)), shift)


def schedule(steps: int, shift: float) -> jax.Array:
    """steps + 1 shifted times from 1 to 0."""
    return shifted(jnp.linspace(1.0, 0.0, steps + 1), shift)


def dynamic_shift(tokens: int) -> float:
    """FLUX's shift: e^mu, mu on the line through 0.5 at 256 target tokens and 1.15 at 4096."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(tokens * slope + (0.5 - slope * 256))


def dynamic_schedule(steps: int, shift: float) -> jax.Array:
    """`schedule`, to the last bit as diffusers' FlowMatchEulerDiscreteScheduler shifts FLUX's."""
    sigma = np.linspace(1, 1 / steps, steps).astype(np.float32)
    sigma = shift / (shift + (1 / sigma - 1))
    return jnp.asarray(np.append(sigma, np.float32(0)))


def dpm_schedule(steps: int, shift: float) -> tuple[jax.Array, jax.Array]:
    """SANA's: steps + 1 sigmas from almost 1 to 0, and the time that the model is told at each.

    As diffusers' DPMSolverMultistepScheduler with flow sigmas, whose models are told 1000 sigma cut
    to whole numbers. On the host in fp64: in fp32 some sigmas fall on the other side of one.
    """
    sigma = shifted(1 - np.linspace(1, 1 / 1000, steps + 1), shift)[::-1]
    told = np.trunc(1000 * sigma[:-1]) / 1000
    return jnp.asarray(sigma, jnp.float32), jnp.asarray(told, jnp.float32)
