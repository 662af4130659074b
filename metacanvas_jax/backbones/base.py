"""What MetaCanvas asks of a DiT: to be cut in two, after patchify and before its first block."""

import abc

import jax
from flax import nnx

from metacanvas_jax.types import Patches, Visual


class Backbone(nnx.Module, abc.ABC):
    """`width` of its tokens, `patch` size, `latent_channels`, `context_width` of its text input.

    How an image comes in is each backbone's own affair: appended tokens, channels, reference slots.
    `takes_context` says whether Visual's context images are seen; `pooled_width` is that of the
    vector that stands for the whole prompt, where there is one.
    """

    width: int
    patch: int
    latent_channels: int
    context_width: int
    takes_context: bool = False
    pooled_width: int | None = None

    @abc.abstractmethod
    def patchify(self, z_BTHWC: jax.Array, visual: Visual) -> Patches:
        """Noisy latents to token grids."""

    @abc.abstractmethod
    def velocity(self, patches: Patches, t_BT, context_BLD, context_length_B) -> jax.Array:
        """Token grids to the velocity, in fp32 and the shape of the latents; t in 0..1."""

    def grid(self, latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """(T, H, W) of the latents -> (T, h, w) of the tokens."""
        T, H, W = latents
        return T, H // self.patch, W // self.patch
