"""Space to depth: a lossless autoencoder without parameters, for the quickstart."""

import dataclasses

from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.vae.base import Vae


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    stride: int


class PixelVae(Vae):
    """Of pictures, or of a video with a latent frame for each of its frames."""

    def __init__(self, config: PixelConfig, *, dtype, rngs):
        del dtype, rngs  # it computes nothing
        self.stride, self.channels = config.stride, 3 * config.stride**2

    def encode(self, x_BFHWC):
        return to_patches(x_BFHWC, self.stride)

    def decode(self, z_BTHWC):
        return from_patches(z_BTHWC, self.stride)
