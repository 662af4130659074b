"""Folders as published evaluators read them: which pictures lie where, and what is amiss there.

The evaluators are not run here; they take the folder.
"""

import abc
import collections
import dataclasses
import functools
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from metacanvas_jax.data.media import read_image
from metacanvas_jax.types import InputError

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
VIDEO = '.mp4'
_PNG_END = b'IEND\xaeB`\x82'


@dataclasses.dataclass(frozen=True)
class Picture:
    """One to draw, with the noise of fold_in(key(seed), index); `path` is below the output.

    A video if the path ends so. `images`, `references` and `video` are what the prompt is about;
    `stills` are {path: which of the video's frames lies there too, as a picture}.
    """

    id: str
    prompt: str
    index: int
    seed: int
    path: str
    images: tuple[pathlib.Path, ...] = ()
    references: tuple[pathlib.Path, ...] = ()  # of what shall be in a video
    video: pathlib.Path | None = None
    stills: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """All files that come of drawing it."""
        return (self.path, *self.stills)


@dataclasses.dataclass(frozen=True)
class Source:
    """What lies beside the results: a file of the user's, or its frame at a second."""

    file: pathlib.Path
    second: float | None = None

    def save(self, file: BinaryIO) -> None:
        """A video as it is; a picture, or a frame (the last one of a shorter video), as PNG."""
        if self.second is None and self.file.suffix == VIDEO:
            file.write(self.file.read_bytes())
            return
        pixels = read_image(self.file) if self.second is None else self._frame()
        Image.fromarray(pixels).save(file, 'PNG')

    def _frame(self) -> np.ndarray:
        assert self.second is not None
        found = None
        try:
            with av.open(self.file) as container:
                for frame in container.decode(video=0):
                    found = frame
                    if frame.time is not None and frame.time > self.second - 1e-3:
                        break
        except FFmpegError as error:
            raise InputError(f'{self.file} is no video, or cut off: {error.strerror}') from error
        if found is None:
            raise InputError(f'{self.file} has no frames')
        return np.rot90(found.to_ndarray(format='rgb24'), round(found.rotation / 90))


@dataclasses.dataclass(frozen=True)
class Fault:
    """`kind` is missing, empty, unreadable, wrong or extra."""

    kind: str
    path: str
    reason: str = ''

    def __str__(self) -> str:
        return f'{self.kind} {self.path}' + (f' ({self.reason})' if self.reason else '')


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """A benchmark's folder: these files, and no others."""

    @abc.abstractmethod
    def pictures(self, seed: int) -> list[Picture]:
        """By index."""

    def lines(self) -> Mapping[str, str]:
        """{path: the line of JSON in that file}."""
        return {}

    def sources(self) -> Mapping[str, Source]:
        """{path: what of the user's lies there}."""
        return {}

    def bears(self, path: str) -> bool:
        """Whether a file that is not asked for may lie there."""
        del path
        return False

    def faults(self, folder: pathlib.Path) -> list[Fault]:
        if folder.exists() and not folder.is_dir():
            raise InputError(f'{folder} is a file; a benchmark wants a folder')
        lines = self.lines()
        paths = [path for picture in self.pictures(0) for path in picture.paths]
        paths += self.sources()
        found = [
            (_video_fault if path.endswith(VIDEO) else _picture_fault)(folder / path, path)
            for path in paths
        ]
        found += [_line_fault(folder / path, path, line) for path, line in lines.items()]
        return [*filter(None, found), *self._extra(folder, {*paths, *lines})]

    def summary(self, faults: Sequence[Fault]) -> str:
        counts = collections.Counter(fault.kind for fault in faults)
        told = ', '.join(f'{count} {kind}' for kind, count in counts.items())
        pictures = self.pictures(0)
        noun = 'videos' if pictures[0].path.endswith(VIDEO) else 'pictures'
        beside = sum(len(p.stills) for p in pictures) + len(self.sources())
        counts = {noun: len(pictures), 'lines': len(self.lines()), 'files beside them': beside}
        parts = ', '.join(f'{count} {what}' for what, count in counts.items() if count)
        return f'{parts}; {told or "whole"}'

    def _extra(self, folder: pathlib.Path, files: set[str]) -> Iterator[Fault]:
        """Of a folder that is not asked for only the folder itself."""
        folders = {str(parent) for file in files for parent in pathlib.PurePath(file).parents}
        for path in sorted(folder.rglob('*')):
            inside = path.relative_to(folder)
            known = str(inside) in (folders if path.is_dir() else files)
            if not known and str(inside.parent) in folders and not self.bears(str(inside)):
                yield Fault('extra', str(inside))


def _picture_fault(file: pathlib.Path, path: str) -> Fault | None:
    if not file.is_file():
        return Fault('missing', path)
    if not (data := file.read_bytes()):
        return Fault('empty', path)
    if not data.endswith(_PNG_END):
        return Fault('unreadable', path, 'it does not end as a PNG does')
    try:
        Image.open(io.BytesIO(data), formats=['PNG']).verify()  # the checksums; load() skips them
        Image.open(io.BytesIO(data), formats=['PNG']).load()
    except Exception as error:  # Pillow raises all kinds, of a PNG without pixels an IndexError
        return Fault('unreadable', path, str(error))
    return None


def _video_fault(file: pathlib.Path, path: str) -> Fault | None:
    """All packets must be there and the first frame decode; to decode all would take hours."""
    if not file.is_file():
        return Fault('missing', path)
    if not file.stat().st_size:
        return Fault('empty', path)
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            next(container.decode(stream))
            container.seek(0)
            packets = sum(p.size > 0 and not p.is_corrupt for p in container.demux(stream))
    except (FFmpegError, IndexError, StopIteration) as error:
        return Fault('unreadable', path, str(error) or 'it holds no video')
    if packets != stream.frames:
        return Fault('unreadable', path, f'it holds {packets} of its {stream.frames} frames')
    return None


def _line_fault(file: pathlib.Path, path: str, line: str) -> Fault | None:
    if not file.is_file():
        return Fault('missing', path)
    if not (data := file.read_bytes()):
        return Fault('empty', path)
    try:
        value = json.loads(data)
    except ValueError as error:  # also of bytes that are no UTF-8
        return Fault('unreadable', path, str(error))
    return None if value == json.loads(line) else Fault('wrong', path, f'wants {line}')


@dataclasses.dataclass(frozen=True)
class GenEval(Layout):
    """GenEval (arXiv 2310.11513), as its evaluation/evaluate_images.py reads it.

    00000/metadata.jsonl        line 0 of the benchmark's own evaluation_metadata.jsonl
    00000/samples/00000.png     so many of its prompt

    Its own generator adds 00000/grid.png, which the evaluator does not look at.
    """

    samples: int = 4

    def pictures(self, seed: int) -> list[Picture]:
        """Of sample j of prompt i the index is i * samples + j."""
        return [
            Picture(
                id=f'{i:05}/{j:05}',
                prompt=json.loads(line)['prompt'],
                index=i * self.samples + j,
                seed=seed,
                path=f'{i:05}/samples/{j:05}.png',
            )
            for i, line in enumerate(_geneval())
            for j in range(self.samples)
        ]

    def lines(self) -> Mapping[str, str]:
        return {f'{i:05}/metadata.jsonl': line for i, line in enumerate(_geneval())}

    def bears(self, path: str) -> bool:
        return re.fullmatch(r'\d{5}/grid\.png', path) is not None


@functools.cache
def _geneval() -> list[str]:
    """The 553 prompts, as published."""
    file = ASSETS / 'geneval' / 'evaluation_metadata.jsonl'
    return file.read_text(encoding='utf-8').splitlines()


def read_rows(file: pathlib.Path, wanted: Mapping[str, type]) -> list[dict]:
    """The objects of a .jsonl file, which have at least these keys, with values of these types."""
    if not file.is_file():
        raise InputError(f'no such file: {file}; it is to hold lines of JSON: {", ".join(wanted)}')
    rows = []
    for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f'{file}:{number} is not JSON: {error}') from error
        for key, kind in wanted.items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                raise InputError(f'{file}:{number} wants {key!r}, a {kind.__name__}')
        rows.append(row)
    if not rows:
        raise InputError(f'{file} holds no prompt')
    return rows


def given(file: pathlib.Path, name: str) -> pathlib.Path:
    """A picture or video that a file names, relative to itself."""
    path = file.parent / name
    if not path.is_file():
        raise InputError(f'{file} names {name!r}, but there is no {path}')
    return path


def distinct(
    pictures: list[Picture], file: pathlib.Path, sources: Mapping[str, Source] | None = None
) -> list[Picture]:
    """The pictures of a file; refuses names that are none, and two things of one name."""
    paths = collections.Counter(path for picture in pictures for path in picture.paths)
    paths.update(list(sources or ()))
    if twice := [path for path, count in paths.items() if count > 1]:
        raise InputError(f'{file}: two files would be {twice[0]}')
    for picture in pictures:
        if picture.id in ('', '.', '..') or '/' in picture.id:
            raise InputError(f'{file}: {picture.id!r} is not a file name')
    return pictures


# What --prompts may name instead of a file.
