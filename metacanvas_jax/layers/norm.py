"""Normalisation in fp32, returned in the dtype of the input, and AdaLN's modulation."""

import jax
import jax.numpy as jnp
from flax import nnx


class RmsNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        # Rounded before the weight, as Qwen and diffusers do: it matters in bf16.
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class OffsetRmsNorm(nnx.Module):
    """RMS norm whose weight is kept as its offset from one (Gemma)."""

    def __init__(self, width: int, eps: float):
        self.offset = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        # Rounded after the weight, unlike RmsNorm.
        return (y * (1 + self.offset[...].astype(jnp.float32))).astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Without weights, as AdaLN wants it."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.mean(jnp.square(y - mean), -1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return (x * (1 + scale) + shift).astype(x.dtype)
