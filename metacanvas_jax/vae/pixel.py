"""Space, and time, to depth: lossless autoencoders without parameters, for the quickstart."""

import dataclasses

import jax.numpy as jnp
from einops import rearrange

from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.vae.base import Vae


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    stride: int


class PixelVae(Vae):
    """Of pictures, or of a video with a latent frame for each of its frames."""

    def __init__(self, config: PixelConfig, *, dtype, rngs):
        del dtype, rngs  # it computes nothing
        self.stride, self.channels = config.stride, 3 * self.time_stride * config.stride**2

    def encode(self, x_BFHWC):
        """As if the first frame had stood still before: alone it is the first latent frame."""
        before = jnp.repeat(x_BFHWC[:, :1], self.time_stride - 1, axis=1)
        x = jnp.concatenate([before, x_BFHWC], 1)
        x = rearrange(x, 'B (T f) H W C -> B T H W (f C)', f=self.time_stride)
        return to_patches(x, self.stride)

    def decode(self, z_BTHWC):
        x = from_patches(z_BTHWC, self.stride)
        x = rearrange(x, 'B T H W (f C) -> B (T f) H W C', f=self.time_stride)
        return x[:, self.time_stride - 1 :]


class PixelVideoVae(PixelVae):
    """Two frames to a latent frame."""

    time_stride = 2
