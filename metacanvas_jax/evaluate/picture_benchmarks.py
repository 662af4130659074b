"""Benchmarks of pictures made from pictures, whose prompts and pictures the user has.

GEdit-Bench and OmniContext are data sets with pictures inside. What is read is a .jsonl file of
their rows, with each picture saved beside it and named, relative to the file, where the row had it:

    for i, row in enumerate(load_dataset('stepfun-ai/GEdit-Bench')['train']):
        for name in ('input_image', 'input_image_raw'):
            row[name].save(f'{i}_{name}.png')
            row[name] = f'{i}_{name}.png'
        print(json.dumps(row), file=lines)
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from metacanvas_jax.evaluate.layouts import Layout, Picture, Source, distinct, given, read_rows
from metacanvas_jax.types import InputError

GEDIT_GROUPS = (
    'background_change',
    'color_alter',
    'material_alter',
    'motion_change',
    'ps_human',
    'style_change',
    'subject-add',
    'subject-remove',
    'subject-replace',
    'text_change',
    'tone_transfer',
)
OMNICONTEXT_TASKS = (
    'single_character',
    'single_object',
    'multi_character',
    'multi_object',
    'multi_character_object',
    'scene_character',
    'scene_object',
    'scene_character_object',
)


@dataclasses.dataclass(frozen=True)
class GEdit(Layout):
    """GEdit-Bench (arXiv 2504.17761), as its test_gedit_score.py reads RESULTS/MODEL.

    fullset/color_alter/en/KEY.png           the edited picture
    fullset/color_alter/en/KEY_SRCIMG.png    what was edited

    `data` has lines of task_type, key, instruction, instruction_language and input_image, of
    stepfun-ai/GEdit-Bench; the model is given input_image_raw where there is one. The evaluator
    itself adds a folder named after its judge.
    """

    data: pathlib.Path
    language: str = 'en'

    def pictures(self, seed: int) -> list[Picture]:
        found = []
        for i, row in enumerate(self._rows()):
            shown = given(self.data, row.get('input_image_raw') or row['input_image'])
            found.append(
                Picture(
                    id=row['key'],
                    prompt=row['instruction'],
                    index=i,
                    seed=seed,
                    path=f'{self._folder(row)}/{row["key"]}.png',
                    images=(shown,),
                )
            )
        return distinct(found, self.data, self.sources())

    def sources(self) -> Mapping[str, Source]:
        return {
            f'{self._folder(row)}/{row["key"]}_SRCIMG.png': Source(
                given(self.data, row['input_image'])
            )
            for row in self._rows()
        }

    def bears(self, path: str) -> bool:
        return path in ('gpt4o', 'qwen25vl')

    def _folder(self, row: dict) -> str:
        return f'fullset/{row["task_type"]}/{row["instruction_language"]}'

    def _rows(self) -> list[dict]:
        keys = ('task_type', 'key', 'instruction', 'instruction_language', 'input_image')
        rows = read_rows(self.data, dict.fromkeys(keys, str))
        _check_tasks(rows, GEDIT_GROUPS, self.data)
        mine = [row for row in rows if row['instruction_language'] == self.language]
        if not mine:
            raise InputError(f'{self.data} holds no prompt whose language is {self.language!r}')
        return mine


@dataclasses.dataclass(frozen=True)
class ImgEdit(Layout):
    """ImgEdit-Bench's basic suite (arXiv 2505.20275), as its basic_bench.py reads a folder.

    KEY.png    the edited picture of each key of basic_edit.json

    `data` is that file, among the folders of pictures which its ids name. The evaluator adds
    result.json.
    """

    data: pathlib.Path

    def pictures(self, seed: int) -> list[Picture]:
        found = [
            Picture(
                id=key,
                prompt=row['prompt'],
                index=i,
                seed=seed,
                path=f'{key}.png',
                images=(given(self.data, row['id']),),
            )
            for i, (key, row) in enumerate(self._rows().items())
        ]
        return distinct(found, self.data)

    def bears(self, path: str) -> bool:
        return path == 'result.json'

    def _rows(self) -> dict[str, dict]:
        if not self.data.is_file():
            raise InputError(f'no such file: {self.data}; it is to be basic_edit.json')
        try:
            rows = json.loads(self.data.read_text(encoding='utf-8'))
        except ValueError as error:
            raise InputError(f'{self.data} is not JSON: {error}') from error
        if not isinstance(rows, dict) or not rows:
            raise InputError(f'{self.data} wants an object of keys, as basic_edit.json is')
        for key, row in rows.items():
            texts = [row.get(name) for name in ('id', 'prompt')] if isinstance(row, dict) else []
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(f'{self.data}: {key!r} wants id and prompt')
        return rows


@dataclasses.dataclass(frozen=True)
class OmniContext(Layout):
    """OmniContext (arXiv 2506.18871), as its test_omnicontext_score.py reads RESULTS/MODEL.

    fullset/single_object/KEY.png

    `data` has lines of key, task_type, instruction and input_images (a list), of
    OmniGen2/OmniContext. The evaluator adds gpt4dot1, and where it cannot read a verdict stores a
    number drawn at random.
    """

    data: pathlib.Path

    def pictures(self, seed: int) -> list[Picture]:
        found = [
            Picture(
                id=row['key'],
                prompt=row['instruction'],
                index=i,
                seed=seed,
                path=f'fullset/{row["task_type"]}/{row["key"]}.png',
                images=tuple(given(self.data, name) for name in row['input_images']),
            )
            for i, row in enumerate(omnicontext_rows(self.data))
        ]
        return distinct(found, self.data)

    def bears(self, path: str) -> bool:
        return path == 'gpt4dot1'


def omnicontext_rows(data: pathlib.Path) -> list[dict]:
    wanted = {'key': str, 'task_type': str, 'instruction': str, 'input_images': list}
    rows = read_rows(data, wanted)
    _check_tasks(rows, OMNICONTEXT_TASKS, data)
    return rows


def _check_tasks(rows: list[dict], known: tuple[str, ...], data: pathlib.Path) -> None:
    """The evaluators pass over others in silence, or look for them elsewhere."""
    if unknown := {row['task_type'] for row in rows} - {*known}:
        raise InputError(
            f'{data} has the task_type {sorted(unknown)[0]!r}; there are: {", ".join(known)}'
        )
