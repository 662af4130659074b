"""Normalisation in fp32, returned in the dtype of the input, and AdaLN's modulation."""

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import nnx


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """Without weights. Rounded before them, as Qwen and diffusers do: it matters in bf16."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return y.astype(x.dtype)


class RmsNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.eps) * self.scale[...].astype(x.dtype)


class BiasedRmsNorm(nnx.Module):
    """RmsNorm(x) + bias: that of DC-AE, over channels."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (a[...].astype(x.dtype) for a in (self.scale, self.bias))
        return rms_norm(x, self.eps) * scale + bias


class LengthNorm(nnx.Module):
    """x sqrt(D) / max(|x|, 1e-12) * scale: an RMS norm without an epsilon (that of Wan's VAE)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(y).sum(-1, keepdims=True))
        y = y * (x.shape[-1] ** 0.5 / jnp.maximum(length, 1e-12))
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class FrozenBatchNorm(nnx.Module):
    """A BatchNorm2d that has been trained: an affine map by the statistics it remembers."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.mean = nnx.Param(jnp.zeros(width), axes=(None,))
        self.var = nnx.Param(jnp.ones(width), axes=(None,))
        self.count = nnx.Param(jnp.zeros((), int), axes=())  # of batches: kept for the export
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
        y = (x.astype(jnp.float32) - self.mean[...]) * scale + self.bias[...]
        return y.astype(x.dtype)


class NoNorm(nnx.Module):
    """Where a norm stands in one version of a model and none in another."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class OffsetRmsNorm(nnx.Module):
    """RMS norm whose weight is kept as its offset from one (Gemma)."""

    def __init__(self, width: int, eps: float):
        self.offset = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_norm(x.astype(jnp.float32), self.eps)  # rounded after the weight, unlike RmsNorm
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


class GroupNorm(nnx.Module):
    """Over all pixels of a group of neighbouring channels, one picture at a time."""

    def __init__(self, width: int, groups: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.groups, self.eps = groups, eps

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = x_BHWC.astype(jnp.float32)
        y = y - _group_means(y, self.groups)
        y = y * jax.lax.rsqrt(_group_means(jnp.square(y), self.groups) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x_BHWC.dtype)


def _group_means(y_BHWC: jax.Array, groups: int) -> jax.Array:
    """(B, 1, 1, C). Pixels first, channel by channel: twice as fast on CPU as groups at once.

    Columns before rows: XLA adds one number after the other, and long sums lose digits.
    """
    y_BC = y_BHWC.mean(2).mean(1)
    means = reduce(y_BC, 'B (g c) -> B g', 'mean', g=groups)
    return repeat(means, 'B g -> B 1 1 (g c)', c=y_BC.shape[-1] // groups)


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return (x * (1 + scale) + shift).astype(x.dtype)
