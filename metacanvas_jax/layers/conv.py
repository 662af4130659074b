"""Convolutions, channels last."""

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_vjp
def depthwise_conv(x_BHWC: jax.Array, kernel_33C: jax.Array) -> jax.Array:
    """3 x 3 cross-correlation per channel, zero padding, as nine shifted multiply-adds.

    A grouped convolution is 10 to 34 times slower on CPU and its gradient worse; on GPU the nine
    terms fuse into one kernel.
    """
    return jax.lax.platform_dependent(x_BHWC, kernel_33C, cpu=_by_images, default=_correlate)


def _correlate(x_BHWC, kernel_33C) -> jax.Array:
    first, *rest = (x * kernel_33C[n // 3, n % 3] for n, x in enumerate(_shifts(x_BHWC)))
    return sum(rest, start=first)


def _shifts(x_BHWC):
    """The nine neighbours of every pixel."""
    H, W = x_BHWC.shape[1:3]
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]


def _gradients(x_BHWC, kernel_33C, g_BHWC):
    products = (jnp.einsum('BHWC,BHWC->C', x, g_BHWC) for x in _shifts(x_BHWC))
    kernel_9C = jnp.stack(list(products))
    return _correlate(g_BHWC, kernel_33C[::-1, ::-1]), kernel_9C.reshape(kernel_33C.shape)


# XLA's CPU backend fuses the nine terms into each of their uses and computes them again there, and
# takes six times too long over the sum of the kernel's gradient. A loop over images keeps both in
# their places, and in the cache.


def _by_images(x_BHWC, kernel_33C):
    return jax.lax.map(lambda x_HWC: _correlate(x_HWC[None], kernel_33C)[0], x_BHWC)


def _gradients_by_images(x_BHWC, kernel_33C, g_BHWC):
    def step(total_9C, image):
        x, g = (a[None] for a in image)
        products = jnp.stack([_sum_pixels(shift * g) for shift in _shifts(x)])
        return total_9C + products, _correlate(g, kernel_33C[::-1, ::-1])[0]

    zero_9C = jnp.zeros((9, kernel_33C.shape[-1]), g_BHWC.dtype)
    kernel_9C, x_grad = jax.lax.scan(step, zero_9C, (x_BHWC, g_BHWC))
    return x_grad, kernel_9C.reshape(kernel_33C.shape)


def _sum_pixels(x_1HWC):
    """By halves: unlike a reduction, additions of slices are vectorised over channels."""
    x = x_1HWC.reshape(-1, x_1HWC.shape[-1])
    while len(x) > 1:
        half = len(x) // 2
        x, odd = x[:half] + x[half : 2 * half], x[2 * half :]
        x = x.at[: len(odd)].add(odd)
    return x[0]


def _forward(x_BHWC, kernel_33C):
    return depthwise_conv(x_BHWC, kernel_33C), (x_BHWC, kernel_33C)


def _backward(saved, g_BHWC):
    return jax.lax.platform_dependent(*saved, g_BHWC, cpu=_gradients_by_images, default=_gradients)


depthwise_conv.defvjp(_forward, _backward)


class DepthwiseConv(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        kernel = nnx.initializers.uniform(2 / 3)(rngs.params(), (3, 3, width)) - 1 / 3
        self.kernel = nnx.Param(kernel, axes=(None, None, 'mlp'))
        self.bias = nnx.Param(jnp.zeros(width), axes=('mlp',))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        dtype = x_BHWC.dtype
        return depthwise_conv(x_BHWC, self.kernel[...].astype(dtype)) + self.bias[...].astype(dtype)
