"""Where records come from: random access by index, endless or of a known length."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from metacanvas_jax.data.captioned import Captioned, Clips
from metacanvas_jax.data.columns import NAMES
from metacanvas_jax.data.records import Record, TextRecord
from metacanvas_jax.data.samples import KINDS, find_samples
from metacanvas_jax.data.shapes import LENGTH, Edit, Picture, ShapeEdits, Shapes, render
from metacanvas_jax.data.shapes_text import READ, SEE, ShapeTexts, layout
from metacanvas_jax.data.shapes_video import CLIPS, Clip, Motion, ShapeClips, render_clip
from metacanvas_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Records of the shapes world, train split: `record` renders what `scenes` hold at an index."""

    scenes: Any
    record: Callable[[Any, Any], Record]
    data: Any  # config.data

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Record:
        return self.record(self.scenes[index], self.data)


def picture_record(picture: Picture, data) -> Record:
    pixels = render(picture.scene, data.size)
    return Record(text=picture.request.caption, pixels=pixels[None], plan=layout(picture.scene))


def edit_record(edit: Edit, data) -> Record:
    """Before and after an instruction."""
    source, target = (render(scene, data.size)[None] for scene in (edit.source, edit.target))
    return Record(edit.instruction, target, layout(edit.target), source=source)


def clip_record(clip: Clip, data) -> Record:
    """With all that any task of a clip shows."""

    def draw(motion: Motion) -> np.ndarray:
        return render_clip(motion, data.frames, data.size)

    pixels = draw(clip.motion)
    return Record(
        clip.text,
        pixels,
        clip.plan,
        source=None if clip.source is None else draw(clip.source),
        fps=data.fps,
        first=pixels[0] if clip.task == 'i2v' else None,
        references=tuple(render(scene, data.size) for scene in clip.references),
    )


@dataclasses.dataclass(frozen=True)
class ShapeDialogues:
    """Texts about scenes, with the picture where they are about one that is seen."""

    texts: ShapeTexts
    size: int

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> TextRecord:
        text = self.texts[index]
        pictures = () if text.scene is None else (render(text.scene, self.size),)
        return TextRecord(user=text.user, assistant=text.assistant, pictures=pictures)


def _dialogues(data, *kinds: str) -> ShapeDialogues:
    return ShapeDialogues(ShapeTexts(data.seed, kinds), data.size)


def _captioned(data) -> dict[str, Captioned]:
    """Those that config.data.tasks asks for."""
    columns, paths = data.get('columns') or {}, data.get('paths') or {}
    _check_names('columns', columns, NAMES)
    _check_names('paths', paths, [kind.name for kind in KINDS])
    sources = {}
    for kind in KINDS:
        if not set(kind.tasks) & set(data.tasks):
            continue
        path = paths.get(kind.name) or data.get('path')
        if path is None:
            raise InputError(
                f'config.data.path is missing, or config.data.paths.{kind.name}; give a folder '
                'of tars, of parquet or of dataset.jsonl'
            )
        height, width = (data.height, data.width) if 'height' in data else (data.size, data.size)
        source = Captioned(
            find_samples(path, columns, kind),
            height=height,
            width=width,
            seed=data.seed,
            kind=kind,
            clips=Clips(data.frames, data.fps, data.short_clips) if kind.video else None,
            references=data.references if kind.references else 0,
        )
        sources |= dict.fromkeys(kind.tasks, source)
    return sources


def _check_names(key: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f'config.data.{key} has {unknown[0]!r}; it takes {", ".join(known)}')


def _pictures(source) -> dict:
    """What is drawn from its caption can be drawn again from itself."""
    return {'t2i': source, 'recon': source}


def _shapes(data) -> dict:
    return {
        **_pictures(Drawn(Shapes(data.seed, 'train'), picture_record, data)),
        'edit': Drawn(ShapeEdits(data.seed, 'train'), edit_record, data),
        **{task: Drawn(ShapeClips(data.seed, 'train', task), clip_record, data) for task in CLIPS},
    }


# config.data.source -> {task: source}
SOURCES = {
    'captioned': _captioned,
    'shapes': _shapes,
    'shapes_text': lambda data: {
        'layout': _dialogues(data, 'caption'),
        'dialogue': _dialogues(data, *(kind for kind in READ if kind != 'caption')),
        'picture': _dialogues(data, *SEE),
        'picture_question': _dialogues(data, 'picture_question'),
        'picture_relation': _dialogues(data, 'picture_relation'),
        **_shapes(data),  # whose plans are to be written
    },
}
