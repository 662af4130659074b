"""The shapes world: pictures of plain shapes with GenEval's captions, and edits between them.

Everything is computed from (seed, split, index): no files, no network. Lengths are in units of the
picture's side, x to the right, y down. Objects are vector shapes, so any picture size will do; they
stand in the corners of the picture, so that a small model learns what is asked, not where exactly.
Four (colour, shape) pairs are held out: they occur nowhere in the train split.
"""

import functools
import itertools
import operator
from dataclasses import dataclass, replace

import numpy as np

from metacanvas_jax.types import InputError

SHAPES = ('circle', 'square', 'triangle', 'cross')
COLOURS = {
    'red': (220, 0, 20),
    'orange': (255, 120, 0),
    'yellow': (255, 230, 0),
    'green': (0, 160, 40),
    'cyan': (0, 210, 230),
    'blue': (20, 50, 230),
    'purple': (140, 0, 200),
    'pink': (255, 120, 200),
}
BACKGROUNDS = {'white': (255, 255, 255), 'grey': (128, 128, 128), 'black': (0, 0, 0)}
HELD_OUT = (('green', 'circle'), ('red', 'square'), ('blue', 'triangle'), ('yellow', 'cross'))
ALL_PAIRS = tuple(itertools.product(COLOURS, SHAPES))
TRAIN_PAIRS = tuple(p for p in ALL_PAIRS if p not in HELD_OUT)

SPLITS = ('train', 'held_out')
TOLD = 'told'  # a split of scenes for words alone: all pairs alike
CATEGORIES = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
RELATIONS = {'left of': (0, -1), 'right of': (0, 1), 'above': (1, -1), 'below': (1, 1)}
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
TEMPLATES = ('{}', 'a picture of {}', 'a photo of {}')
EDITS = ('add', 'remove', 'replace', 'recolour', 'move', 'background')
SIDES = {'left': (0, -1), 'right': (0, 1), 'top': (1, -1), 'bottom': (1, 1)}  # as RELATIONS

RADIUS = 3 / 16  # 12 of 32 pixels wide, on multiples of 4: whole patches of the quickstart
_LOW, _HIGH = RADIUS, 1 - RADIUS
PLACES = {  # (x, y) of centres, in reading order
    'northwest': (_LOW, _LOW),
    'northeast': (_HIGH, _LOW),
    'southwest': (_LOW, _HIGH),
    'southeast': (_HIGH, _HIGH),
}
ARM = 0.36  # half the width of a cross's arm, in radii
LENGTH = 2**31 - 1

# The words of a Philox key are (seed, stream); a record's index is the counter's high half.
_STREAMS = {
    ('shapes', 'train'): 0,
    ('shapes', 'held_out'): 1,
    ('edits', 'train'): 2,
    ('edits', 'held_out'): 3,
    ('texts', 'train'): 4,
    ('requests', 'train'): 5,
    ('requests', 'held_out'): 6,
    ('texts', 'held_out'): 7,
    ('edit_requests', 'train'): 8,
    ('edit_requests', 'held_out'): 9,
    ('clips', 'train'): 10,
    ('clips', 'held_out'): 11,
    ('clip_requests', 'train'): 12,
    ('clip_requests', 'held_out'): 13,
}


@dataclass(frozen=True)
class Object:
    """One shape; `radius` is half the side of its bounding box, (x, y) the box's centre."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f'{self.colour} {self.shape}'


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Asked:
    """What a judge looks for; `colour` is None where the category does not judge colours."""

    count: int
    colour: str | None
    shape: str


@dataclass(frozen=True)
class Request:
    """A caption and what GenEval's rule for its category checks (arXiv:2310.11513, Sec. 3)."""

    category: str
    caption: str
    asked: tuple[Asked, ...]
    relation: str | None = None  # of asked[0] to asked[1]


@dataclass(frozen=True)
class Picture:
    request: Request
    scene: Scene


@dataclass(frozen=True)
class Edit:
    category: str
    instruction: str
    source: Scene
    target: Scene


@dataclass(frozen=True)
class Shapes:
    """Captioned scenes, addressed at random; every record costs the same."""

    seed: int
    split: str

    def __post_init__(self):
        check_known('split', self.split, SPLITS)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Picture:
        rng = generator(self.seed, 'shapes', self.split, index)
        return draw_picture(rng, pick(rng, CATEGORIES), self.split)


@dataclass(frozen=True)
class ShapeEdits:
    """Pairs of scenes that differ in one thing, and the instruction from one to the other."""

    seed: int
    split: str

    def __post_init__(self):
        check_known('split', self.split, SPLITS)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Edit:
        rng = generator(self.seed, 'edits', self.split, index)
        return draw_edit(rng, pick(rng, EDITS), self.split)


def requests(split: str, per_category: int, seed: int) -> tuple[Request, ...]:
    """Evaluation prompts, category after category, from a stream that no training record shares."""
    check_known('split', split, SPLITS)
    return tuple(
        draw_picture(generator(seed, 'requests', split, i), category, split).request
        for i, category in enumerate(c for c in CATEGORIES for _ in range(per_category))
    )


def edit_requests(split: str, per_category: int, seed: int) -> tuple[Edit, ...]:
    """Edits to evaluate, category after category, from a stream that no training record shares."""
    check_known('split', split, SPLITS)
    return tuple(
        draw_edit(generator(seed, 'edit_requests', split, i), category, split)
        for i, category in enumerate(c for c in EDITS for _ in range(per_category))
    )


def render(scene: Scene, size: int) -> np.ndarray:
    """The antialiased picture, uint8 (size, size, 3)."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        rows, columns, cover = coverage(o.shape, o.x, o.y, o.radius, size)
        region = picture[rows, columns]
        region += cover[..., None] * (_RGB[o.colour] - region)
    picture += 0.5  # rounds, since astype truncates
    return picture.astype(np.uint8)


def coverage(shape: str, x: float, y: float, radius: float, size: int):
    """(rows, columns, share covered of each pixel there) for the part of the box in the picture."""
    left, top = max(int((x - radius) * size), 0), max(int((y - radius) * size), 0)
    right, bottom = int((x + radius) * size) + 1, int((y + radius) * size) + 1
    centres = pixel_centres(size)
    dx = (centres[left:right] - np.float32(x))[None, :]
    dy = (centres[top:bottom] - np.float32(y))[:, None]
    return slice(top, bottom), slice(left, right), share_covered(shape, dx, dy, radius, size)


def share_covered(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float, size: int):
    """Of pixels at (dx, dy) from the box's centre: rows (..., 1, W) and columns (..., H, 1)."""
    distance = _DISTANCES[shape](np.abs(dx), dy, np.float32(radius))
    return np.minimum(np.maximum(0.5 - distance * size, 0), 1)


def phrase(colour: str | None, shape: str, count: int = 1) -> str:
    """'a circle', 'an orange circle', 'three red crosses'."""
    noun = shape if count == 1 else shape + ('es' if shape.endswith('s') else 's')
    noun = noun if colour is None else f'{colour} {noun}'
    number = NUMBERS[count] if count > 1 else 'an' if noun[0] in 'aeiou' else 'a'
    return f'{number} {noun}'


def generator(seed: int, kind: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of one record."""
    index = operator.index(index)
    if not 0 <= index < LENGTH:
        raise IndexError(f'record {index} of {LENGTH}')
    if not 0 <= seed < 2**64:
        raise InputError(f'the seed of a shapes dataset must lie in 0..2**64-1, not {seed}')
    key = _STREAMS[kind, split] << 64 | seed
    return np.random.Generator(np.random.Philox(key=key, counter=index << 128))


def pick(rng: np.random.Generator, items):
    return items[int(rng.random() * len(items))]  # ten times faster than rng.choice


def draw_picture(rng: np.random.Generator, category: str, split: str) -> Picture:
    """A request of the category and a scene that fulfils it and shows nothing else."""
    check_known('category', category, CATEGORIES)
    nouns = 2 if category in ('two_object', 'position', 'color_attr') else 1
    pairs = draw_pairs(rng, split, nouns, NOUNS_DIFFER.get(category, _anything))
    if rng.random() < 0.5:
        pairs = pairs[::-1]
    judged = category in ('colors', 'color_attr')
    named = judged or split != 'train' or rng.random() < 0.5
    count = 2 + int(rng.random() * 3) if category == 'counting' else 1
    relation = pick(rng, tuple(RELATIONS)) if category == 'position' else None

    phrases = [phrase(c if named else None, s, count) for c, s in pairs]
    caption = pick(rng, TEMPLATES).format((f' {relation} ' if relation else ' and ').join(phrases))
    asked = tuple(Asked(count, c if judged else None, s) for c, s in pairs)
    objects = _draw_objects(rng, pairs * count, RELATIONS[relation] if relation else None)
    scene = Scene(pick(rng, tuple(BACKGROUNDS)), objects)
    return Picture(Request(category, caption, asked, relation), scene)


def draw_edit(rng: np.random.Generator, category: str, split: str) -> Edit:
    """An edit of the category; all (colour, shape) pairs of both scenes differ."""
    check_known('edit', category, EDITS)
    background = pick(rng, tuple(BACKGROUNDS))
    if category in ('add', 'remove'):
        n = 2 + int(rng.random() * 3)
        objects = _draw_objects(rng, draw_pairs(rng, split, n))
        whole, rest = Scene(background, objects), Scene(background, objects[1:])
        if category == 'add':
            colour_and_shape = phrase(objects[0].colour, objects[0].shape)
            return Edit(category, f'add {colour_and_shape}', rest, whole)
        return Edit(category, f'remove the {objects[0].name}', whole, rest)

    n = 1 + int(rng.random() * (3 if category == 'move' else 4))  # four leave no room to move
    if category in ('replace', 'recolour'):
        new, *old = draw_pairs(rng, split, n + 1, NOUNS_DIFFER[category])
        objects = _draw_objects(rng, old)
        first = replace(objects[0], colour=new[0], shape=new[1])
        text = f'replace the {objects[0].name} with {phrase(*new)}'
        if category == 'recolour':
            text = f'make the {objects[0].name} {new[0]}'
        source, target = Scene(background, objects), Scene(background, (first, *objects[1:]))
        return Edit(category, text, source, target)

    pairs = draw_pairs(rng, split, n)
    if category == 'background':
        new = pick(rng, tuple(b for b in BACKGROUNDS if b != background))
        objects = _draw_objects(rng, pairs)
        text = f'change the background to {new}'
        return Edit(category, text, Scene(background, objects), Scene(new, objects))

    side = pick(rng, tuple(SIDES))
    axis, sign = SIDES[side]
    at = _HIGH if sign > 0 else _LOW
    while True:
        objects = _draw_objects(rng, pairs)
        moved = replace(objects[0], x=at) if axis == 0 else replace(objects[0], y=at)
        if all((moved.x, moved.y) != (o.x, o.y) for o in objects):
            break
    text = f'move the {moved.name} to the {side}'
    source, target = Scene(background, objects), Scene(background, (moved, *objects[1:]))
    return Edit(category, text, source, target)


def _anything(pairs) -> bool:
    return True


def shapes_differ(pairs) -> bool:
    return pairs[0][1] != pairs[1][1]


NOUNS_DIFFER = {
    'two_object': shapes_differ,
    'position': shapes_differ,
    'color_attr': lambda pairs: shapes_differ(pairs) and pairs[0][0] != pairs[1][0],
    'replace': shapes_differ,
    'recolour': lambda pairs: not shapes_differ(pairs),
}


_PAIRS = {  # of a scene's first object, of the others
    'train': (TRAIN_PAIRS, TRAIN_PAIRS),
    'held_out': (HELD_OUT, TRAIN_PAIRS),
    TOLD: (ALL_PAIRS, ALL_PAIRS),
}


def draw_pairs(rng, split: str, n: int, accept=_anything) -> list[tuple[str, str]]:
    """n different pairs; in the held-out split the first, and only the first, is a held-out one."""
    first, others = _PAIRS[split]
    while True:
        pairs = [pick(rng, first)]
        while len(pairs) < n:
            pair = pick(rng, others)
            if pair not in pairs:
                pairs.append(pair)
        if accept(pairs):
            return pairs


def _draw_objects(rng, pairs, relation=None) -> tuple[Object, ...]:
    """Objects of the given pairs, uniform over all valid placements (by rejection)."""
    places = list(PLACES.values())
    while True:
        found = [places[i] for i in rng.random(len(places)).argsort()[: len(pairs)]]
        if relation is None:
            break
        axis, sign = relation
        if (found[0][axis] - found[1][axis]) * sign > 0:
            break
    return tuple(
        Object(shape, colour, x, y, RADIUS)
        for (colour, shape), (x, y) in zip(pairs, found, strict=True)
    )


def check_known(what: str, value: str, known) -> None:
    if value not in known:
        raise InputError(
            f'unknown {what} {value!r} of the shapes world; use one of {", ".join(known)}'
        )


@functools.lru_cache
def pixel_centres(size: int) -> np.ndarray:
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def _circle(dx, dy, r):
    return np.sqrt(dx * dx + dy * dy) - r


def _square(dx, dy, r):
    return np.maximum(dx, np.abs(dy)) - r


def _triangle(dx, dy, r):  # apex in the middle of the box's top, base along its bottom
    return np.maximum(dy - r, (2 * dx - (dy + r)) * np.float32(5**-0.5))


def _cross(dx, dy, r):
    dy = np.abs(dy)
    return np.maximum(np.maximum(dx, dy) - r, np.minimum(dx, dy) - np.float32(ARM) * r)


# Signed distances for dx = |x - centre| as a row and dy = y - centre as a column; < 0 inside.
_DISTANCES = {'circle': _circle, 'square': _square, 'triangle': _triangle, 'cross': _cross}
_RGB = {name: np.array(rgb, np.float32) for name, rgb in COLOURS.items()}
