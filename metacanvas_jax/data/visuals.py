"""How the pictures of a task come into a DiT: each backbone's own affair.

sana    not at all
flux    a source picture as tokens beside those of the target
wan     a first frame in its place, clean; a source in the channels of the condition; references
        in slots in front of the frames
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metacanvas_jax.data.media import cover, letterbox, opaque
from metacanvas_jax.data.records import Record
from metacanvas_jax.types import InputError, Visual

# ------------------------------------------------------------ shapes


def _refuse(frames_FHWC: np.ndarray, frames: int) -> np.ndarray:
    raise InputError(
        f'a clip has {len(frames_FHWC)} frames, config.data.frames asks for {frames}; give longer '
        "clips, ask for fewer frames, or set config.data.short_clips to 'hold'"
    )


def _hold(frames_FHWC: np.ndarray, frames: int) -> np.ndarray:
    return np.concatenate([frames_FHWC, np.repeat(frames_FHWC[-1:], frames - len(frames_FHWC), 0)])


# config.data.short_clips -> what becomes of a clip that is shorter than asked
SHORT_CLIPS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    'refuse': _refuse,
    'hold': _hold,  # the last frame, to the end
}


def latent_frames(frames: int, stride: int) -> int:
    """Those that a VAE makes of so many frames, with its stride in time."""
    if frames < 1 or (frames - 1) % stride:
        nearest = max(0, round((frames - 1) / stride)) * stride + 1
        raise InputError(
            f'config.data.frames {frames} is not 1 more than a multiple of {stride} '
            f'(nearest: {nearest})'
        )
    return (frames - 1) // stride + 1


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static shapes of a system's batches."""

    height: int
    width: int
    frames: int  # of a video; a picture is one
    latent_frames: int  # that the VAE makes of them
    references: int  # slots
    short_clips: str
    as_given: bool = False  # a batch's pictures are of one size, which need not be this

    def cut(self, frames_FHWC: np.ndarray, frames: int) -> np.ndarray:
        """The first ones, at this size."""
        if len(frames_FHWC) < frames:
            frames_FHWC = SHORT_CLIPS[self.short_clips](frames_FHWC, frames)
        shown = [opaque(frame) for frame in frames_FHWC[:frames]]
        if not self.as_given:
            shown = [cover(frame, self.height, self.width) for frame in shown]
        return np.stack(shown)

    def fit(self, record: Record, frames: int) -> Record:
        """As the MLLM and the DiT shall both see it. The first frame is the target's own, or given
        where there is no target yet.
        """
        changes: dict[str, Any] = {'references': tuple(map(opaque, record.references))}
        if record.first is not None:
            changes['first'] = self.cut(record.first[None], 1)[0]
        if record.source is not None:
            changes['source'] = self.cut(record.source, frames)
        if record.pixels is not None:
            changes['pixels'] = pixels = self.cut(record.pixels, frames)
            changes['first'] = pixels[0]
        return dataclasses.replace(record, **changes)


def to_float(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """uint8, equal in size -> one more axis in front, in [-1, 1]."""
    return np.stack(pixels).astype(np.float32) / 127.5 - 1


# ------------------------------------------------------------ ways in


def _nothing(bucket: Bucket, records: Sequence[Record]) -> dict[str, Any]:
    del bucket, records
    return {}


def _context_image(bucket: Bucket, records: Sequence[Record]) -> dict[str, Any]:
    """A picture, as large as the target."""
    del bucket
    sources = [record.source[0] for record in records if record.source is not None]
    return {'context_images': (to_float(sources),)}


def _first_frame(bucket: Bucket, records: Sequence[Record]) -> dict[str, Any]:
    """The VAE is causal: its first latent frame is the first frame alone (App. E)."""
    clean_BT = np.zeros((len(records), bucket.latent_frames), np.float32)
    clean_BT[:, 0] = 1
    return {'clean_BT': clean_BT}


def _condition(bucket: Bucket, records: Sequence[Record]) -> dict[str, Any]:
    del bucket
    sources = [record.source for record in records if record.source is not None]
    return {'condition_BTHWC': to_float(sources)}


def _slots(bucket: Bucket, records: Sequence[Record]) -> dict[str, Any]:
    """Whole pictures, letterboxed. Every slot is filled: where there are fewer, they repeat."""
    filled = []
    for record in records:
        if (count := len(record.references)) > bucket.references:
            raise InputError(
                f'{count} references are given, and config.data.references has '
                f'{bucket.references} slots'
            )
        framed = [letterbox(r, bucket.height, bucket.width) for r in record.references]
        filled.append(np.stack([framed[slot % count] for slot in range(bucket.references)]))
    return {'references_BRHWC': to_float(filled)}


Entrances = Mapping[str | None, Callable[[Bucket, Sequence[Record]], dict[str, Any]]]

# What a task gives the DiT (Task.given) -> fields of its Visual.
SANA: Entrances = {None: _nothing}
FLUX: Entrances = {None: _nothing, 'source': _context_image}
WAN: Entrances = {None: _nothing, 'first': _first_frame}
WIDE_WAN: Entrances = {**WAN, 'source': _condition, 'references': _slots}

# config.backbone.kind -> its sizes -> what it takes
ENTRANCES: Mapping[str, Callable[[Any], Entrances]] = {
    'sana': lambda sizes: SANA,
    'flux': lambda sizes: FLUX,
    'wan': lambda sizes: WIDE_WAN if sizes.condition_channels else WAN,
}


@dataclasses.dataclass(frozen=True)
class Visuals:
    """Host side of what a DiT sees besides noise and text."""

    bucket: Bucket
    entrances: Entrances

    def see(self, given: str | None, records: Sequence[Record], latent_frames: int) -> Visual:
        """`records` have the bucket's shapes."""
        clean_BT = np.zeros((len(records), latent_frames), np.float32)
        return Visual(**{'clean_BT': clean_BT, **self.entrances[given](self.bucket, records)})
