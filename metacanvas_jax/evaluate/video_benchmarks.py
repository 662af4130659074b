"""Benchmarks of videos. VBench's prompts ship; its pictures, and all of others, the user has."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

from metacanvas_jax.evaluate.layouts import (
    ASSETS,
    Layout,
    Picture,
    Source,
    distinct,
    given,
    read_rows,
)
from metacanvas_jax.evaluate.picture_benchmarks import omnicontext_rows
from metacanvas_jax.types import InputError

FLICKER = 'temporal_flickering'
MOST = 25  # videos of a prompt: their noise does not depend on how many are drawn


@dataclasses.dataclass(frozen=True)
class VBench(Layout):
    """VBench (arXiv 2311.17982), as VBench.build_full_info_json reads a folder.

    PROMPT-0.mp4 to PROMPT-4.mp4    of each prompt, and to PROMPT-24.mp4 of those for flickering,
                                    of which its static_filter.py chooses

    Nothing else may lie there: the evaluator takes the suffix of all videos from any one file. Two
    prompts differ in case alone, so the file system must tell cases apart.
    """

    samples: int = 5
    flicker_samples: int = MOST

    def pictures(self, seed: int) -> list[Picture]:
        found = []
        for i, (prompt, dimensions) in enumerate(_vbench().items()):
            count = self.flicker_samples if FLICKER in dimensions else self.samples
            found += [_sample(prompt, i, j, seed, ()) for j in range(count)]
        return found


@dataclasses.dataclass(frozen=True)
class VBenchI2V(Layout):
    """VBench-I2V (VBench++, arXiv 2411.13503): as VBench, and each prompt has a first frame.

    `data` is the folder of pictures of the video's shape, such as crop/16-9.
    """

    data: pathlib.Path
    samples: int = 5

    def pictures(self, seed: int) -> list[Picture]:
        return [
            _sample(row['prompt_en'], i, j, seed, (self._first(row['image_name']),))
            for i, row in enumerate(_rows('vbench2_i2v_full_info.json'))
            for j in range(self.samples)
        ]

    def _first(self, name: str) -> pathlib.Path:
        if not (path := self.data / name).is_file():
            raise InputError(f'{self.data} wants a picture {name!r} of VBench-I2V')
        return path


@dataclasses.dataclass(frozen=True)
class OmniContextVideo(Layout):
    """OmniContext with videos (the paper's App. G.2), laid out as OmniContext; our own names.

    fullset/single_object/KEY.mp4
    fullset/single_object/frames/KEY_0.png    one a second, for the judge
    """

    data: pathlib.Path
    frames: int = 121
    fps: float = 24

    def pictures(self, seed: int) -> list[Picture]:
        found = []
        for i, row in enumerate(omnicontext_rows(self.data)):
            folder, key = f'fullset/{row["task_type"]}', row['key']
            found.append(
                Picture(
                    id=key,
                    prompt=row['instruction'],
                    index=i,
                    seed=seed,
                    path=f'{folder}/{key}.mp4',
                    references=tuple(given(self.data, name) for name in row['input_images']),
                    stills=_stills(f'{folder}/frames/{key}', self.frames, self.fps),
                )
            )
        return distinct(found, self.data)

    def bears(self, path: str) -> bool:
        return path == 'gpt4dot1'


@dataclasses.dataclass(frozen=True)
class VideoEdits(Layout):
    """Edited videos beside their sources (the paper's App. F.2, whose prompts are not published).

    ID.mp4              the edited video
    ID_source.mp4       what was edited
    frames/ID_0.png, frames/ID_source_0.png    of both one a second, for the judge

    `data` has lines of id, prompt and video.
    """

    data: pathlib.Path
    frames: int = 121
    fps: float = 24

    def pictures(self, seed: int) -> list[Picture]:
        found = [
            Picture(
                id=row['id'],
                prompt=row['prompt'],
                index=i,
                seed=seed,
                path=f'{row["id"]}.mp4',
                video=given(self.data, row['video']),
                stills=_stills(f'frames/{row["id"]}', self.frames, self.fps),
            )
            for i, row in enumerate(self._rows())
        ]
        return distinct(found, self.data, self.sources())

    def sources(self) -> Mapping[str, Source]:
        found = {}
        for row in self._rows():
            name, file = f'{row["id"]}_source', given(self.data, row['video'])
            found[f'{name}.mp4'] = Source(file)
            for second, path in enumerate(_stills(f'frames/{name}', self.frames, self.fps)):
                found[path] = Source(file, second=second)
        return found

    def _rows(self) -> list[dict]:
        rows = read_rows(self.data, dict.fromkeys(('id', 'prompt', 'video'), str))
        if other := [row['video'] for row in rows if not row['video'].endswith('.mp4')]:
            raise InputError(f'{self.data} names {other[0]!r}; the sources are to be .mp4')
        return rows


def _sample(prompt: str, i: int, j: int, seed: int, images: tuple[pathlib.Path, ...]) -> Picture:
    """Video j of prompt i."""
    if j >= MOST:
        raise InputError(f'at most {MOST} videos of a prompt can be told apart, not more')
    name = f'{prompt}-{j}'
    path = f'{name}.mp4'
    return Picture(id=name, prompt=prompt, index=i * MOST + j, seed=seed, path=path, images=images)


def _stills(name: str, frames: int, fps: float) -> dict[str, int]:
    """{path: frame} at the whole seconds of a video."""
    seconds = int((frames - 1) / fps) + 1
    return {f'{name}_{second}.png': round(second * fps) for second in range(seconds)}


@functools.cache
def _rows(name: str) -> list[dict]:
    return json.loads((ASSETS / 'vbench' / name).read_text(encoding='utf-8'))


@functools.cache
def _vbench() -> dict[str, set[str]]:
    """The 944 prompts, each with its dimensions; two of the published 946 rows repeat others."""
    found: dict[str, set[str]] = {}
    for row in _rows('VBench_full_info.json'):
        found.setdefault(row['prompt_en'], set()).update(row['dimension'])
    return found
