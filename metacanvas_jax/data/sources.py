"""Where records come from: random access by index, endless or of a known length."""

import dataclasses

from metacanvas_jax.data.captioned import CaptionedPictures, find_samples
from metacanvas_jax.data.parquet import NAMES
from metacanvas_jax.data.shapes import LENGTH, Shapes, render
from metacanvas_jax.data.shapes_text import READ, SEE, ShapeTexts, layout
from metacanvas_jax.data.tasks import Record, TextRecord
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
        return Record(text=picture.request.caption, pixels=pixels[None], plan=layout(picture.scene))


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
    return CaptionedPictures(samples, height=data.size, width=data.size, seed=data.seed)


# config.data.source -> {task: source}
SOURCES = {
    'captioned': lambda data: {'t2i': _captioned(data)},
    'shapes': lambda data: {'t2i': ShapePictures(data.seed, data.size)},
    'shapes_text': lambda data: {
        'layout': _dialogues(data, 'caption'),
        'dialogue': _dialogues(data, *(kind for kind in READ if kind != 'caption')),
        'picture': _dialogues(data, *SEE),
    },
}
