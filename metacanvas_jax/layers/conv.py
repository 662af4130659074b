"""Convolutions, channels last."""

import jax
import jax.numpy as jnp
from flax import nnx

_MARGIN = ((0, 0), (1, 1), (1, 1), (0, 0))


@jax.custom_vjp
def depthwise_conv(x_BHWC: jax.Array, kernel_33C: jax.Array) -> jax.Array:
    """3 x 3 cross-correlation per channel, zero padding, as nine shifted multiply-adds.

    A grouped convolution is 10 to 34 times slower on CPU and its gradient worse; on GPU the nine
    terms fuse into one kernel.
    """
    H, W = x_BHWC.shape[1:3]
    # The barriers keep XLA from computing what made x (a SiLU, say) anew in each of nine terms, and
    # the nine terms anew in each use of their sum.
    padded = jnp.pad(jax.lax.optimization_barrier(x_BHWC), _MARGIN)
    shifts = _shifts(padded, H, W)
    y = sum(shift * kernel_33C[n // 3, n % 3] for n, shift in enumerate(shifts))
    return jax.lax.optimization_barrier(y)


def _shifts(padded_BHWC, H: int, W: int):
    return [padded_BHWC[..., i : i + H, j : j + W, :] for i in range(3) for j in range(3)]


def _kernel_gradient(padded_BHWC, g_BHWC):
    """sum over pixels of shifted input x gradient, (9, C)."""
    shifts = _shifts(padded_BHWC, *g_BHWC.shape[1:3])
    return jnp.stack([jnp.einsum('BHWC,BHWC->C', shift, g_BHWC) for shift in shifts])


def _kernel_gradient_by_rows(padded_BHWC, g_BHWC):
    """The same, some rows at a time: a sum that XLA's CPU backend takes six times longer over."""
    B, H, W, C = g_BHWC.shape
    rows = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or n * W <= 64))

    def add(n, total_9C):
        b, h = n // (H // rows), n % (H // rows) * rows
        g = jax.lax.dynamic_slice(g_BHWC, (b, h, 0, 0), (1, rows, W, C))[0]
        padded = jax.lax.dynamic_slice(padded_BHWC, (b, h, 0, 0), (1, rows + 2, W + 2, C))[0]
        products = [(shift * g).reshape(rows * W, C) for shift in _shifts(padded, rows, W)]
        return total_9C + jnp.stack(
            [sum(product[i] for i in range(rows * W)) for product in products]
        )

    return jax.lax.fori_loop(0, B * H // rows, add, jnp.zeros((9, C), g_BHWC.dtype))


def _forward(x_BHWC, kernel_33C):
    return depthwise_conv(x_BHWC, kernel_33C), (x_BHWC, kernel_33C)


def _backward(saved, g_BHWC):
    x_BHWC, kernel_33C = saved
    gradient = jax.lax.platform_dependent(
        jnp.pad(x_BHWC, _MARGIN), g_BHWC, cpu=_kernel_gradient_by_rows, default=_kernel_gradient
    )
    return depthwise_conv(g_BHWC, kernel_33C[::-1, ::-1]), gradient.reshape(kernel_33C.shape)


depthwise_conv.defvjp(_forward, _backward)


class DepthwiseConv(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        kernel = nnx.initializers.uniform(2 / 3)(rngs.params(), (3, 3, width)) - 1 / 3
        self.kernel = nnx.Param(kernel, axes=(None, None, 'mlp'))
        self.bias = nnx.Param(jnp.zeros(width), axes=('mlp',))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        dtype = x_BHWC.dtype
        return depthwise_conv(x_BHWC, self.kernel[...].astype(dtype)) + self.bias[...].astype(dtype)
