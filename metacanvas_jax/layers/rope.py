"""Rotary positions: of half-split vectors as in the Llama family, of pairs as in FLUX and Wan."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def angles(positions, width: int, theta: float) -> jax.Array:
    """positions x 1 / theta^(2j / width) for j < width / 2, in fp32: (...,) -> (..., width / 2)."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate_half(x_BSNE, angle_BSe) -> jax.Array:
    """Rotates the pairs (j, j + E/2); angles in fp32, (B, S, E/2)."""
    cos, sin = jnp.cos(angle_BSe)[:, :, None], jnp.sin(angle_BSe)[:, :, None]
    a, b = jnp.split(x_BSNE.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSNE.dtype)


def axis_angles(positions, width: int, theta: float) -> np.ndarray:
    """`angles` on the host, in fp64, of the `width` values of a head that belong to one axis."""
    frequency = 1 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    return np.asarray(positions, np.float64)[..., None] * frequency


def grid_rotary(
    grid: Sequence[int], widths: Sequence[int], theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (S, E/2) in fp32, of the tokens of a grid in raster order.

    Axis i turns its own `widths[i]` of the E channels. Angles are fp64, of a few numbers on the
    host: in fp32 an angle of 1000 is known to 6e-5 only.
    """
    angles = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        angle = axis_angles(np.arange(size), width, theta)
        front = [1] * len(grid)
        front[axis] = size
        angles.append(angle.reshape(*front, width // 2))

    def table(function) -> jax.Array:
        parts = [jnp.asarray(function(angle), jnp.float32) for angle in angles]
        parts = [jnp.broadcast_to(part, (*grid, part.shape[-1])) for part in parts]
        return jnp.concatenate(parts, -1).reshape(-1, sum(widths) // 2)

    return table(np.cos), table(np.sin)


def rotate_pairs(x_BSNE, cos_Se, sin_Se) -> jax.Array:
    """Rotates the pairs (2j, 2j + 1), in fp32."""
    cos, sin = cos_Se[:, None], sin_Se[:, None]
    a, b = rearrange(x_BSNE.astype(jnp.float32), 'B S N (e two) -> two B S N e', two=2)
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return rearrange(y, 'B S N e two -> B S N (e two)').astype(x_BSNE.dtype)
