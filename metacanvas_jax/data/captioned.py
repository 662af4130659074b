"""Records of samples as they lie in files: pictures, edits and videos with their texts."""

import dataclasses
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metacanvas_jax.data.aspects import Size, in_blocks, sizes_of
from metacanvas_jax.data.media import cover, decode_clip, decode_image, video_seconds
from metacanvas_jax.data.places import Place
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.samples import PICTURE, Kind, Rows, Sample
from metacanvas_jax.data.visuals import SHORT_CLIPS
from metacanvas_jax.types import InputError

BROKEN = 0.05  # more of all samples than this: something is wrong with the data


@dataclasses.dataclass(frozen=True)
class Clips:
    """What is taken of a video: so many frames, at a rate, from anywhere in it."""

    frames: int
    fps: float
    short_clips: str  # config.data.short_clips


class Captioned:
    """Records in an order shuffled by `seed`, all pictures resized and cropped to one size.

    A broken sample is replaced by the next one that is whole: what stands at an index depends on
    the data and the seed alone. `broken` are those met so far, {name: reason}, each said once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        height: int,
        width: int,
        seed: int,
        kind: Kind = PICTURE,
        clips: Clips | None = None,
        references: int = 0,
    ):
        """`clips` are for videos, `references` the most that a sample may show."""
        if not samples:
            raise InputError('there are no captioned pictures')
        self._samples, self._seed = samples, seed
        self._size, self._sizes = (height, width), None
        self._kind, self._clips, self._references = kind, clips, references
        rng = np.random.default_rng(seed)
        self._order = (
            samples.shuffled(rng) if isinstance(samples, Rows) else rng.permutation(len(samples))
        )
        self._lock = threading.Lock()
        self.broken: dict[str, str] = {}

    def group(self, batch: int, nearest: Callable[[int, int], Size]) -> None:
        """Pictures of every `batch` records in a row get one size, the `nearest` to theirs.

        What has no size is broken, and left out; a last batch of a size repeats some of its first.
        """
        if self._clips is not None:
            raise InputError(f'config.data.sizes is for pictures, not for {self._kind.name}')
        sizes: dict[int, Size] = {}
        for at, size in enumerate(sizes_of(self._samples, self.fingerprint)):
            name = self._samples[at].name
            if isinstance(size, str):
                self._note(name, size)
                continue
            try:
                sizes[at] = nearest(*size)
            except InputError as error:
                self._note(name, f'{name}: {error}')
        if not sizes:
            raise InputError(f'all {len(self._samples)} samples are broken; {self._some()}')
        self._sizes = sizes
        self._order = in_blocks([at for at in self._order if at in sizes], sizes, batch)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Record:
        size = self._size_at(index)
        for at in range(index, index + len(self)):
            if self._size_at(at) != size:
                continue
            sample = self._samples[self._order[at % len(self)]]
            try:
                return self._read(sample, size, np.random.default_rng((self._seed, index)))
            except (InputError, OSError) as error:
                self._note(sample.name, str(error))
        raise InputError(f'all {len(self._samples)} samples are broken; {self._some()}')

    def _size_at(self, index: int) -> Size:
        return self._size if self._sizes is None else self._sizes[self._order[index % len(self)]]

    @property
    def fingerprint(self) -> str:
        """A digest of what stands at each index, and of the files that it lies in."""
        digest, files = hashlib.sha256(repr((self._size, self._clips)).encode()), set()
        for index in self._order:
            sample = self._samples[index]
            known = sample.caption if isinstance(sample.caption, str) else None
            digest.update(repr((sample.name, known)).encode())
            places = (sample.target, sample.caption, sample.source, *sample.references)
            files |= {getattr(place, 'file', None) for place in places}
        paths = {getattr(file, 'path', file) for file in files if file is not None}
        for path in sorted(paths):
            stat = path.stat() if path.exists() else None
            digest.update(repr(stat and (path, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------ one sample

    def _read(self, sample: Sample, size: Size, rng: np.random.Generator) -> Record:
        """`rng` chooses the words, where there are several, and where a clip begins."""
        texts, name = _texts(sample), sample.name
        text = texts[rng.integers(len(texts))]
        shown = {'pixels': sample.target}
        if 'source' in self._kind.roles:
            shown['source'] = sample.source
        places = {field: place for field, place in shown.items() if place is not None}
        if missing := shown.keys() - places.keys():
            what = 'source' if 'source' in missing else 'video' if self._kind.video else 'picture'
            raise InputError(f'{name} has no {what}')
        fit = functools.partial(cover, height=size[0], width=size[1])
        found: Mapping[str, Any]
        if self._clips is None:
            found = {field: fit(_picture(place, name))[None] for field, place in places.items()}
        else:
            found = self._cut(places, name, rng.random(), fit) | {'fps': self._clips.fps}
        return Record(text, **found, references=self._shown(sample))

    def _cut(self, videos: Mapping[str, Place], name: str, lot: float, fit) -> dict[str, Any]:
        """The same moments of each."""
        assert self._clips
        frames, fps = self._clips.frames, self._clips.fps
        seconds = []
        for place in videos.values():
            with place.open() as file:
                seconds.append(video_seconds(file, name))
        start, found = lot * max(0, min(seconds) - frames / fps), {}
        for field, place in videos.items():
            with place.open() as file:
                clip = decode_clip(file, name, frames, fps, start=start, fit=fit)
            if len(clip) < frames:
                try:
                    clip = SHORT_CLIPS[self._clips.short_clips](clip, frames)
                except InputError as error:
                    raise InputError(f'{name}: {error}') from error
            found[field] = clip
        return found

    def _shown(self, sample: Sample) -> tuple[np.ndarray, ...]:
        """References as they are."""
        if not self._kind.references:
            return ()
        places = [place for place in sample.references if place is not None]
        if not 0 < len(places) == len(sample.references) <= self._references:
            raise InputError(
                f'{sample.name} has {len(places)} of {len(sample.references)} references; '
                f'config.data.references has {self._references} slots'
            )
        return tuple(_picture(place, sample.name) for place in places)

    # ------------------------------------------------------------ broken ones

    def _note(self, name: str, reason: str) -> None:
        with self._lock:
            if name in self.broken:
                return
            self.broken[name] = reason
            count = len(self.broken)
        print(f'broken sample {count} of {len(self._samples)}, replaced: {reason}', file=sys.stderr)
        if count > max(10, BROKEN * len(self._samples)):
            raise InputError(f'{count} of {len(self._samples)} samples are broken; {self._some()}')

    def _some(self) -> str:
        return '; '.join(list(self.broken.values())[:5])


def _texts(sample: Sample) -> list[str]:
    """Those that are not empty."""
    if sample.caption is None:
        raise InputError(f'{sample.name} has no caption')
    try:
        caption = sample.caption
        texts = [caption] if isinstance(caption, str) else caption.texts()
    except UnicodeDecodeError as error:
        raise InputError(f'the caption of {sample.name} is no UTF-8') from error
    if not (told := [text.strip() for text in texts if text.strip()]):
        raise InputError(f'the caption of {sample.name} is empty')
    return told


def _picture(place: Place, name: str) -> np.ndarray:
    with place.open() as file:
        return decode_image(file, name)
