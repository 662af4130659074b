"""Space to depth: a lossless autoencoder without parameters, for the quickstart."""

from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.vae.base import Vae


class PixelVae(Vae):
    """Latents are `scale` x pixels: how loud the picture is beside noise of variance 1."""

    def __init__(self, stride: int, scale: float):
        self.stride, self.channels, self.scale = stride, 3 * stride**2, scale

    def encode(self, x_BFHWC):
        return self.scale * to_patches(x_BFHWC, self.stride)

    def decode(self, z_BTHWC):
        return from_patches(z_BTHWC, self.stride) / self.scale
