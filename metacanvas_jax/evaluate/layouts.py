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

from PIL import Image

from metacanvas_jax.types import InputError

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
_PNG_END = b'IEND\xaeB`\x82'


@dataclasses.dataclass(frozen=True)
class Picture:
    """One to draw, with the noise of fold_in(key(seed), index); `path` is below the output."""

    id: str
    prompt: str
    index: int
    seed: int
    path: str


@dataclasses.dataclass(frozen=True)
class Fault:
    """`kind` is missing, empty, unreadable, wrong or extra."""

    kind: str
    path: str
    reason: str = ''

    def __str__(self) -> str:
        return f'{self.kind} {self.path}' + (f' ({self.reason})' if self.reason else '')


class Layout(abc.ABC):
    """A benchmark's folder: these files, and no others."""

    @abc.abstractmethod
    def pictures(self, seed: int) -> list[Picture]:
        """By index."""

    @abc.abstractmethod
    def lines(self) -> Mapping[str, str]:
        """{path: the line of JSON in that file}."""

    @abc.abstractmethod
    def bears(self, path: str) -> bool:
        """Whether a file that is not asked for may lie there."""

    def faults(self, folder: pathlib.Path) -> list[Fault]:
        if folder.exists() and not folder.is_dir():
            raise InputError(f'{folder} is a file; a benchmark wants a folder')
        lines = self.lines()
        paths = [picture.path for picture in self.pictures(0)]
        found = [_picture_fault(folder / path, path) for path in paths]
        found += [_line_fault(folder / path, path, line) for path, line in lines.items()]
        return [*filter(None, found), *self._extra(folder, {*paths, *lines})]

    def summary(self, faults: Sequence[Fault]) -> str:
        counts = collections.Counter(fault.kind for fault in faults)
        told = ', '.join(f'{count} {kind}' for kind, count in counts.items())
        return f'{len(self.pictures(0))} pictures, {len(self.lines())} lines; {told or "whole"}'

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


# What --prompts may name instead of a file.
LAYOUTS: Mapping[str, type[GenEval]] = {'geneval': GenEval}
