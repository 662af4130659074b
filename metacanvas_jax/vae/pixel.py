"""Space to depth: a lossless autoencoder without parameters, for the quickstart."""

from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.vae.base import Vae


class PixelVae(Vae):
    def __init__(self, stride: int):
        self.stride, self.channels = stride, 3 * stride**2

    def encode(self, x_BFHWC):
        return to_patches(x_BFHWC, self.stride)

    def decode(self, z_BTHWC):
        return from_patches(z_BTHWC, self.stride)
