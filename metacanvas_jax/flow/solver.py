"""Solvers integrate any velocity(z, t) from t = 1 (noise) to t = 0 (data)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metacanvas_jax.flow.times import dpm_schedule, dynamic_schedule, dynamic_shift, schedule
from metacanvas_jax.flow.unipc import unipc, unipc_schedule


def euler(velocity: Callable, z_1: jax.Array, times: jax.Array) -> jax.Array:
    """z <- z + (t' - t) velocity(z, t) along `times`."""

    def step(z, pair):
        t, t_next = pair
        return z + (t_next - t) * velocity(z, t), None

    return jax.lax.scan(step, z_1, jnp.stack([times[:-1], times[1:]], 1))[0]


def dpm_solver(velocity: Callable, z_1: jax.Array, times: tuple[jax.Array, jax.Array]) -> jax.Array:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095), along sigmas on which `velocity` is told times.

    x = z - sigma velocity(z, t)        the data that is foreseen, x_ the one foreseen before
    z <- r z + (1 - r) (x + (x - x_) h' / 2h)        r = sigma'/sigma
    h and h' are the last and the next step of log((1 - sigma) / sigma). The first step has no x_
    and the one to sigma 0 an endless h': both are of first order.
    """
    sigma, told = times
    ratio = sigma[1:] / sigma[:-1]
    step = jnp.diff(jnp.log(1 - sigma) - jnp.log(sigma))
    before = jnp.concatenate([jnp.full(1, jnp.inf), step[:-1]])
    weight = jnp.where(sigma[1:] > 0, (1 - ratio) * step / (2 * before), 0)

    def update(carry, at):
        z, x_before = carry
        sigma, t, ratio, weight = at
        x = z - sigma * velocity(z, t)
        return (ratio * z + (1 - ratio) * x + weight * (x - x_before), x), None

    start = z_1, jnp.zeros_like(z_1)
    return jax.lax.scan(update, start, (sigma[:-1], told, ratio, weight))[0][0]


@dataclasses.dataclass(frozen=True)
class Solver:
    """solve(velocity, z_1, times(steps, shift)); where the size decides, the shift(tokens)."""

    times: Callable[[int, float], Any]
    solve: Callable[[Callable, jax.Array, Any], jax.Array]
    shift: Callable[[int], float] | None = None


SOLVERS = {
    'euler': Solver(schedule, euler),
    'dpm++2m': Solver(dpm_schedule, dpm_solver),
    'euler_dynamic': Solver(dynamic_schedule, euler, dynamic_shift),  # FLUX
    'unipc': Solver(unipc_schedule, unipc),
}
