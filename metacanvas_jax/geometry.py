"""What a system is asked to draw, and how large: pixels and frames, latents, tokens."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax.build import check_size, part_sizes, picture_size, size_multiple
from metacanvas_jax.data.kontext_sizes import context_pixels, context_size
from metacanvas_jax.data.media import cover, opaque
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.tasks import TASKS, Readers, check_tasks, find_task
from metacanvas_jax.data.visuals import Bucket, to_float
from metacanvas_jax.flow.solver import Solver
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.types import InputError

Size = tuple[int | None, int | None]  # height and width; None: as the system would have it
Latents = tuple[int, int, int]  # T, H, W


@dataclasses.dataclass(frozen=True)
class Job:
    """Records of one task, as all shall see them at one size."""

    task: str
    latents: Latents
    readers: Readers
    records: Sequence[Record]
    context: tuple[np.ndarray, ...]  # pictures (B, H, W, 3) in [-1, 1]


@dataclasses.dataclass(frozen=True)
class Geometry:
    config: ConfigDict
    stride: int
    time_stride: int
    channels: int
    takes_context: bool

    @property
    def keeps_shape(self) -> bool:
        return self.config.data.get('sizes') == 'kontext'

    @property
    def moves(self) -> bool:
        """Whether this system makes videos: its autoencoder is one of videos, or its data are."""
        return self.time_stride > 1 or self.frames(None) > 1

    @classmethod
    def of(cls, config: ConfigDict, model: MetaCanvas) -> 'Geometry':
        vae, takes_context = model.vae, model.backbone.takes_context
        return cls(config, vae.stride, vae.time_stride, vae.channels, takes_context)

    def frames(self, frames: int | None, task: str | None = None) -> int:
        """Those that are drawn where so many, or as many as the system likes, are asked for."""
        most = self.config.data.get('frames', 1)
        if task is not None:
            check_tasks([task])
            if not TASKS[task].video:
                most = 1
                if frames not in (None, 1):
                    raise InputError(f'task {task!r} makes pictures, not {frames} frames')
        return most if frames is None else frames

    def latents(self, size: Size, frames: int | None, record: Record) -> Latents:
        """Where sizes are Kontext's, what is edited keeps its shape."""
        default = picture_size(self.config)
        if self.keeps_shape and record.source is not None:
            _, height, width, _ = record.source.shape
            default = context_size(height, width, size_multiple(self.config))
        height, width = (d if side is None else side for side, d in zip(size, default, strict=True))
        check_size(self.config, height, width)
        frames = self.frames(frames)
        if frames < 1 or (frames > 1 and not self.moves):
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

    def record(self, prompt: str, images, references, video) -> Record:
        """Images are what is to be edited, or a first frame, as the system takes them."""
        given = Record(prompt, references=tuple(references))
        if video is not None:
            given = dataclasses.replace(given, source=video[0], fps=video[1])
        if not images:
            return given
        if self.takes_context:
            references = (*images[1:], *references)
            return Record(prompt, source=images[0][None], references=references)
        if not self.moves:
            raise InputError('this system draws from text alone: give a prompt without image')
        if len(images) > 1:
            raise InputError(f'a video has one first frame, not {len(images)}')
        return dataclasses.replace(given, first=images[0])

    def job(
        self,
        readers: Readers,
        records: Sequence[Record],
        task: str | None = None,
        size: Size = (None, None),
        frames: int | None = None,
    ) -> Job:
        """`readers` are the system's, for the size of its training."""
        latents = self.latents(size, self.frames(frames, task), records[0])
        if latents[0] == 1 and records[0].first is not None:
            raise InputError('a picture has no first frame; ask for several frames')
        task = task or find_task(records[0], moves=latents[0] > 1)
        bucket = self._bucket(latents, readers)
        visuals = dataclasses.replace(readers.visuals, bucket=bucket)
        readers = dataclasses.replace(readers, visuals=visuals)
        fitted = [readers.fit(task, record) for record in records]
        return Job(task, latents, readers, fitted, self._context(records, latents))

    def _bucket(self, latents: Latents, readers: Readers) -> Bucket:
        """That of the readers, at another size."""
        T, H, W = latents
        return dataclasses.replace(
            readers.visuals.bucket,
            height=H * self.stride,
            width=W * self.stride,
            as_given=False,
            frames=(T - 1) * self.time_stride + 1,
            latent_frames=T,
        )

    def _context(self, records: Sequence[Record], latents: Latents) -> tuple[np.ndarray, ...]:
        """(B, H, W, 3) in [-1, 1] of each picture that a DiT takes as context: what is edited, and
        others beside it, each of its own size.
        """
        if not self.takes_context or records[0].source is None:
            return ()
        resize = functools.partial(context_pixels, multiple=size_multiple(self.config))
        if not self.keeps_shape:
            resize = functools.partial(_covering, size=[side * self.stride for side in latents[1:]])
        pictures = [(*(r.source if r.source is not None else ()), *r.references) for r in records]
        counts, shapes = {len(p) for p in pictures}, {tuple(i.shape for i in p) for p in pictures}
        if len(shapes) > 1 and (self.keeps_shape or len(counts) > 1):
            raise InputError(
                f'the samples of a batch show pictures of different sizes or counts: '
                f'{" and ".join(map(str, sorted(shapes)[:2]))}; draw them one by one'
            )
        columns = zip(*pictures, strict=True)
        return tuple(np.stack([resize(opaque(image)) for image in column]) for column in columns)


def _covering(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return to_float([cover(image, *size)])[0]
