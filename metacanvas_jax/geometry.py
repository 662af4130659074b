"""How large what a system draws is: pixels and frames asked for, latents, tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax.build import check_size, part_sizes, size_multiple
from metacanvas_jax.data.kontext_sizes import context_pixels, context_size
from metacanvas_jax.flow.solver import Solver
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.types import InputError

Size = tuple[int | None, int | None]  # height and width; None: as the system would have it
Latents = tuple[int, int, int]  # T, H, W


@dataclasses.dataclass(frozen=True)
class Geometry:
    config: ConfigDict
    stride: int
    time_stride: int
    channels: int
    takes_context: bool

    @classmethod
    def of(cls, config: ConfigDict, model: MetaCanvas) -> 'Geometry':
        vae, takes_context = model.vae, model.backbone.takes_context
        return cls(config, vae.stride, vae.time_stride, vae.channels, takes_context)

    def latents(self, size: Size, frames: int | None, images: Sequence[np.ndarray]) -> Latents:
        """What was edited keeps its shape."""
        data = self.config.data
        default = (data.height, data.width) if 'height' in data else (data.size, data.size)
        if self.takes_context and images:
            height, width, _ = images[0].shape
            default = context_size(height, width, size_multiple(self.config))
        height, width = (d if side is None else side for side, d in zip(size, default, strict=True))
        check_size(self.config, height, width)
        frames = data.get('frames', 1) if frames is None else frames
        if frames < 1 or (frames > 1 and self.time_stride == 1):
            raise InputError(f'this system makes pictures, not {frames} frames')
        if beyond := (frames - 1) % self.time_stride:
            raise InputError(
                f'frames {frames} is not 1 more than a multiple of {self.time_stride} '
                f'(nearest: {frames - beyond})'
            )
        return (frames - 1) // self.time_stride + 1, height // self.stride, width // self.stride

    def shift(self, solver: Solver, latents: Latents) -> float:
        """Of the solver's times."""
        if solver.shift is None:
            return self.config.sample.shift
        _, H, W = latents
        return solver.shift(H * W // part_sizes(self.config, 'backbone').patch_size ** 2)

    def noise(self, noise: np.ndarray, latents: Latents) -> np.ndarray:
        """(B, T, H, W, C) of (H, W, C) for a picture, (T, H, W, C) for a video, or of several."""
        shape = (*latents, self.channels)
        want = shape[1:] if latents[0] == 1 else shape
        noise = np.asarray(noise, np.float32)
        if noise.shape[-len(want) :] != want:
            raise InputError(f'the noise has shape {noise.shape}, this size wants {want}')
        return noise.reshape(-1, *shape)

    def context(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Context images as a batch of one: each (1, H, W, 3), its size that of training."""
        multiple = size_multiple(self.config)
        return tuple(context_pixels(image, multiple)[None] for image in images)
