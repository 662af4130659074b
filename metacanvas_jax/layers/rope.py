"""Rotary positions in the half-split ("rotate_half") convention of the Llama family."""

import jax
import jax.numpy as jnp


def angles(positions, width: int, theta: float) -> jax.Array:
    """positions x 1 / theta^(2j / width) for j < width / 2, in fp32: (...,) -> (..., width / 2)."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate_half(x_BSNE, angle_BSe) -> jax.Array:
    """Rotates the pairs (j, j + E/2); angles in fp32, (B, S, E/2)."""
    cos, sin = jnp.cos(angle_BSe)[:, :, None], jnp.sin(angle_BSe)[:, :, None]
    a, b = jnp.split(x_BSNE.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSNE.dtype)
