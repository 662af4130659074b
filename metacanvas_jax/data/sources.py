"""Where records come from: random access by index, endless or of a known length."""

import dataclasses

from metacanvas_jax.data.captioned import CaptionedPictures, find_samples
from metacanvas_jax.data.parquet import NAMES
from metacanvas_jax.data.records import Record, TextRecord
from metacanvas_jax.data.shapes import LENGTH, ShapeEdits, Shapes, render
from metacanvas_jax.data.shapes_text import READ, SEE, ShapeTexts, plan
from metacanvas_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class ShapePictures:
    """Captioned pictures of the shapes world, train split."""

    seed: int
    size: int

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Record:
        picture = Shapes(self.seed, 'train')[index]
        pixels = render(picture.scene, self.size)
        return Record(text=picture.request.caption, pixels=pixels[None], plan=plan(picture.scene))


@dataclasses.dataclass(frozen=True)
class ShapeEditPairs:
    """Pictures of the shapes world before and after an instruction, train split."""

    seed: int
    size: int

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Record:
        edit = ShapeEdits(self.seed, 'train')[index]
        source, target = (render(scene, self.size)[None] for scene in (edit.source, edit.target))
        return Record(edit.instruction, target, plan(edit.target), source=source)


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


def _captioned(data) -> CaptionedPictures:
    if data.get('path') is None:
        raise InputError(
            'config.data.path is missing; give a folder of tars, of parquet or of dataset.jsonl'
        )
    columns = data.get('columns') or {}
    if unknown := set(columns) - set(NAMES):
        raise InputError(
            f'config.data.columns has {sorted(unknown)[0]!r}; it takes {", ".join(NAMES)}'
        )
    samples = find_samples(data.path, columns)
    height, width = (data.height, data.width) if 'height' in data else (data.size, data.size)
    return CaptionedPictures(samples, height=height, width=width, seed=data.seed)


def _pictures(source) -> dict:
    """What is drawn from its caption can be drawn again from itself."""
    return {'t2i': source, 'recon': source}


# config.data.source -> {task: source}
SOURCES = {
    'captioned': lambda data: _pictures(_captioned(data)),
    'shapes': lambda data: {
        **_pictures(ShapePictures(data.seed, data.size)),
        'edit': ShapeEditPairs(data.seed, data.size),
    },
    'shapes_text': lambda data: {
        'layout': _dialogues(data, 'caption'),
        'dialogue': _dialogues(data, *(kind for kind in READ if kind != 'caption')),
        'questions': _dialogues(data, 'questions'),
        'picture': _dialogues(data, *SEE),
    },
}
