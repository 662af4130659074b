"""Convolutions, channels last."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.layers.linear import xavier


def convolve(x_BHWC: jax.Array, kernel_kkCD, *, stride: int, padding) -> jax.Array:
    """Cross-correlation in the dtype of its input; `padding` as of jax.lax."""
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel_kkCD.astype(x_BHWC.dtype),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def centred(size: int) -> list[tuple[int, int]]:
    """The padding that keeps a picture's size: k // 2 zeros on each side."""
    return [(size // 2, size // 2)] * 2


class Conv(nnx.Module):
    """k x k cross-correlation; `stride` 2 halves an even picture.

    `pad` are the zeros before and after rows and columns: k // 2 each, unless given.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        size: int,
        stride: int,
        pad: tuple[int, int] | None = None,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        kernel = xavier(rngs.params(), (size, size, d_in, d_out))
        self.kernel = nnx.Param(kernel, axes=(None, None, 'channels', 'channels'))
        self.bias = nnx.Param(jnp.zeros(d_out), axes=('channels',)) if bias else None
        self.stride, self.pad = stride, pad or (size // 2, size // 2)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        padding = [self.pad, self.pad]
        y = convolve(x_BHWC, self.kernel[...], stride=self.stride, padding=padding)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class HalvingConv(nnx.Module):
    """3 x 3 with stride 2; the zeros are below and to the right, as Stable Diffusion's are."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        kernel = xavier(rngs.params(), (3, 3, d_in, d_out))
        self.kernel = nnx.Param(kernel, axes=(None, None, 'channels', 'channels'))
        self.bias = nnx.Param(jnp.zeros(d_out), axes=('channels',))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = convolve(x_BHWC, self.kernel[...], stride=2, padding=[(0, 1), (0, 1)])
        return y + self.bias[...].astype(y.dtype)


class CausalConv(nnx.Module):
    """3 frames x k x k; an output frame sees the frame below it and the two before, none after.

    The caller puts the frames before in front: F frames in, (F - 3) // step + 1 out. A frame that
    comes alone has zeros before it, which are not multiplied.

    As a sum of three convolutions of pictures: 1.2 to 4 times faster than one in three dimensions
    on CPU, and on GPU the latter wants channels first.
    """

    def __init__(self, d_in: int, d_out: int, *, size: int, step: int = 1, rngs: nnx.Rngs):
        kernel = xavier(rngs.params(), (3, size, size, d_in, d_out))
        self.kernel = nnx.Param(kernel, axes=(None, None, None, 'channels', 'channels'))
        self.bias = nnx.Param(jnp.zeros(d_out), axes=('channels',))
        self.step = step

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        B, F = x_BFHWC.shape[:2]
        assert F != 2, 'neither alone nor with the two frames before'
        kernel = self.kernel[...][-F:]
        last = F - len(kernel) + 1

        def term(k: int) -> jax.Array:
            frames = rearrange(x_BFHWC[:, k : k + last : self.step], 'B F H W C -> (B F) H W C')
            return convolve(frames, kernel[k], stride=1, padding=centred(kernel.shape[1]))

        y = sum((term(k) for k in range(1, len(kernel))), start=term(0))
        return rearrange(y + self.bias[...].astype(y.dtype), '(B F) H W C -> B F H W C', B=B)


@jax.custom_vjp
def depthwise_conv(x_BHWC: jax.Array, kernel_kkC: jax.Array) -> jax.Array:
    """k x k cross-correlation per channel (k odd), zero padding, as shifted multiply-adds.

    A grouped convolution is 10 to 34 times slower on CPU and its gradient worse; on GPU the terms
    fuse into one kernel.
    """
    return jax.lax.platform_dependent(x_BHWC, kernel_kkC, cpu=_by_images, default=_correlate)


def _correlate(x_BHWC, kernel_kkC) -> jax.Array:
    k = len(kernel_kkC)
    first, *rest = (x * kernel_kkC[n // k, n % k] for n, x in enumerate(_shifts(x_BHWC, k)))
    return sum(rest, start=first)


def _shifts(x_BHWC, k: int):
    """The k x k neighbours of every pixel."""
    H, W = x_BHWC.shape[1:3]
    edge = (k // 2, k // 2)
    padded = jnp.pad(x_BHWC, ((0, 0), edge, edge, (0, 0)))
    return [padded[:, i : i + H, j : j + W] for i in range(k) for j in range(k)]


def _gradients(x_BHWC, kernel_kkC, g_BHWC):
    shifts = _shifts(x_BHWC, len(kernel_kkC))
    kernel_nC = jnp.stack([jnp.einsum('BHWC,BHWC->C', x, g_BHWC) for x in shifts])
    return _correlate(g_BHWC, kernel_kkC[::-1, ::-1]), kernel_nC.reshape(kernel_kkC.shape)


# XLA's CPU backend fuses the terms into each of their uses and computes them again there, and
# takes six times too long over the sum of the kernel's gradient. A loop over images keeps both in
# their places, and in the cache.


def _by_images(x_BHWC, kernel_kkC):
    return jax.lax.map(lambda x_HWC: _correlate(x_HWC[None], kernel_kkC)[0], x_BHWC)


def _gradients_by_images(x_BHWC, kernel_kkC, g_BHWC):
    def step(total_nC, image):
        x, g = (a[None] for a in image)
        products = jnp.stack([_sum_pixels(shift * g) for shift in _shifts(x, len(kernel_kkC))])
        return total_nC + products, _correlate(g, kernel_kkC[::-1, ::-1])[0]

    zero_nC = jnp.zeros((kernel_kkC[..., 0].size, kernel_kkC.shape[-1]), g_BHWC.dtype)
    kernel_nC, x_grad = jax.lax.scan(step, zero_nC, (x_BHWC, g_BHWC))
    return x_grad, kernel_nC.reshape(kernel_kkC.shape)


def _sum_pixels(x_1HWC):
    """By halves: unlike a reduction, additions of slices are vectorised over channels."""
    x = x_1HWC.reshape(-1, x_1HWC.shape[-1])
    while len(x) > 1:
        half = len(x) // 2
        x, odd = x[:half] + x[half : 2 * half], x[2 * half :]
        x = x.at[: len(odd)].add(odd)
    return x[0]


def _forward(x_BHWC, kernel_kkC):
    return depthwise_conv(x_BHWC, kernel_kkC), (x_BHWC, kernel_kkC)


def _backward(saved, g_BHWC):
    return jax.lax.platform_dependent(*saved, g_BHWC, cpu=_gradients_by_images, default=_gradients)


depthwise_conv.defvjp(_forward, _backward)


class DepthwiseConv(nnx.Module):
    def __init__(self, width: int, *, size: int, bias: bool, rngs: nnx.Rngs):
        kernel = nnx.initializers.uniform(2 / size)(rngs.params(), (size, size, width)) - 1 / size
        self.kernel = nnx.Param(kernel, axes=(None, None, 'mlp'))
        self.bias = nnx.Param(jnp.zeros(width), axes=('mlp',)) if bias else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = depthwise_conv(x_BHWC, self.kernel[...].astype(x_BHWC.dtype))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
