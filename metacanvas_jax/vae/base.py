"""What MetaCanvas asks of an autoencoder: normalised latents in and out, and their geometry."""

import abc
import dataclasses

import jax
from flax import nnx


class Vae(nnx.Module, abc.ABC):
    """`stride` pixels per latent row and column, `channels` of the latents.

    F = 1 + `time_stride` (T - 1) frames make T latent frames.
    """

    stride: int
    channels: int
    time_stride: int = 1
    # Of the squares of pixels that its last layer makes: tiles fade by such squares.
    patch: int = 1

    @abc.abstractmethod
    def encode(self, x_BFHWC: jax.Array) -> jax.Array:
        """Pixels in [-1, 1] -> latents (B, T, H, W, C)."""

    @abc.abstractmethod
    def decode(self, z_BTHWC: jax.Array) -> jax.Array:
        """Latents -> pixels in about [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class CachedConfig:
    stride: int
    channels: int


class CachedLatents(Vae):
    """Stands where latents were stored beforehand; it makes no pictures."""

    def __init__(self, config: CachedConfig, *, dtype, rngs):
        del dtype, rngs  # it computes nothing
        self.stride, self.channels = config.stride, config.channels

    def encode(self, x_BFHWC):
        raise NotImplementedError('latents were stored beforehand')

    def decode(self, z_BTHWC):
        raise NotImplementedError('a cache has no decoder')
