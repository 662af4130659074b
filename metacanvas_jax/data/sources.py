"""Where records come from: random access by index, endless or of a known length."""

import dataclasses

from metacanvas_jax.data.shapes import LENGTH, Shapes, render
from metacanvas_jax.data.shapes_text import ShapeTexts
from metacanvas_jax.data.tasks import Record


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
        return Record(text=picture.request.caption, pixels=pixels[None])


# config.data.source -> {task: source}
SOURCES = {
    'shapes': lambda data: {'t2i': ShapePictures(data.seed, data.size)},
    'shapes_text': lambda data: {
        'layout': ShapeTexts(data.seed, ('caption',)),
        'dialogue': ShapeTexts(data.seed, ('describe', 'question', 'edit')),
    },
}
