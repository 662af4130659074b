"""The shapes world moves: clips with captions of motion, and clips that are made from others.

One or two objects go at constant speed from one corner to the next, or stay; the camera is still.
Clips are addressed like pictures of shapes.py, at any number of frames and any size:

    t2v, i2v   'a red circle moves northwest to northeast and a blue square is southeast, on white'
    v2v        'make the red circle green', of a clip whose twin is the target
    r2v        'the circle moves northwest to northeast, on white', whose colour a picture shows
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from metacanvas_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    LENGTH,
    NOUNS_DIFFER,
    PLACES,
    RADIUS,
    SPLITS,
    Object,
    Scene,
    check_known,
    draw_pairs,
    generator,
    phrase,
    pick,
    pixel_centres,
    shapes_differ,
    share_covered,
)
from metacanvas_jax.data.shapes_text import layout, place
from metacanvas_jax.types import InputError

MOTIONS = {  # category -> whether each object moves
    'one_moves': (True,),
    'two_move': (True, True),
    'one_stays': (True, False),
}
CLIP_EDITS = ('recolour', 'replace', 'remove', 'background')

_APART = 2 * RADIUS + 1 / 8  # of centres along one axis, as corners are at the least
_CROP = 3 / 8  # the radius of an object alone, twice that in clips


@dataclass(frozen=True)
class Motion:
    """Object i goes in a straight line from `first.objects[i]` to `last.objects[i]`."""

    first: Scene
    last: Scene

    def at(self, share: float) -> Scene:
        """The scene after this share of the time."""
        objects = tuple(
            replace(a, x=a.x + share * (b.x - a.x), y=a.y + share * (b.y - a.y))
            for a, b in zip(self.first.objects, self.last.objects, strict=True)
        )
        return replace(self.first, objects=objects)


@dataclass(frozen=True)
class Clip:
    """A record of any task: what is said, what is shown beside it, and the motion to come.

    i2v shows `motion.first`, v2v `source`, r2v `references`: each object alone.
    """

    task: str
    category: str
    text: str
    motion: Motion
    source: Motion | None = None
    references: tuple[Scene, ...] = ()

    @property
    def plan(self) -> str:
        """The first frame and the last one, place after place."""
        return f'{layout(self.motion.first)}. {layout(self.motion.last)}'


@dataclass(frozen=True)
class ShapeClips:
    """Clips of one task, a key of CLIPS, addressed at random; every record costs the same."""

    seed: int
    split: str
    task: str

    def __post_init__(self):
        check_known('split', self.split, SPLITS)
        check_known('task', self.task, CLIPS)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Clip:
        rng = generator(self.seed, 'clips', self.split, index)
        return draw_clip(rng, self.task, pick(rng, categories(self.task)), self.split)


def clip_requests(task: str, split: str, per_category: int, seed: int) -> tuple[Clip, ...]:
    """Clips to evaluate, category after category, from a stream that no training record shares."""
    check_known('split', split, SPLITS)
    check_known('task', task, CLIPS)
    return tuple(
        draw_clip(generator(seed, 'clip_requests', split, i), task, category, split)
        for i, category in enumerate(c for c in categories(task) for _ in range(per_category))
    )


def categories(task: str) -> tuple[str, ...]:
    return CLIPS[task][0]


def draw_clip(rng: np.random.Generator, task: str, category: str, split: str) -> Clip:
    """All (colour, shape) pairs of a clip, and of its source, differ."""
    check_known('category', category, categories(task))
    return CLIPS[task][1](rng, task, category, split)


def render_clip(motion: Motion, frames: int, size: int) -> np.ndarray:
    """uint8 (F, size, size, 3), F of 4 n + 1: each frame as `render` draws its scene."""
    centres, times = pixel_centres(size), shares(frames)[:, None, None]
    clip = np.empty((frames, size, size, 3), np.uint8)
    clip[:] = BACKGROUNDS[motion.first.background]
    for a, b in zip(motion.first.objects, motion.last.objects, strict=True):
        # All frames at once, of the strip that the object runs through.
        rows, columns = (
            slice(int((min(ends) - a.radius) * size), int((max(ends) + a.radius) * size) + 1)
            for ends in ((a.y, b.y), (a.x, b.x))
        )
        dx = (centres[columns] - (a.x + times * (b.x - a.x))).astype(np.float32)
        dy = (centres[rows, None] - (a.y + times * (b.y - a.y))).astype(np.float32)
        cover = share_covered(a.shape, dx, dy, a.radius, size)
        for channel, value in enumerate(COLOURS[a.colour]):
            strip = clip[:, rows, columns, channel]
            ground = strip.astype(np.float32)
            strip[:] = ground + cover * (value - ground) + np.float32(0.5)
    return clip


def shares(frames: int) -> np.ndarray:
    """The share of the time that has gone by at each frame."""
    if frames < 1 or frames % 4 != 1:
        near = max(frames - 1, 0) // 4 * 4 + 1
        raise InputError(
            f'a clip of the shapes world has 4 n + 1 frames, such as {near} or {near + 4}, '
            f'not {frames}'
        )
    return np.arange(frames) / max(frames - 1, 1)


def _draw_captioned(rng, task: str, category: str, split: str) -> Clip:
    moves = _draw_moves(rng, category)
    pairs = _shuffled(rng, draw_pairs(rng, split, len(moves)))
    motion = _draw_motion(rng, moves, pairs)
    return Clip(task, category, _tell(motion, [phrase(*pair) for pair in pairs]), motion)


def _draw_referenced(rng, task: str, category: str, split: str) -> Clip:
    """Shapes differ, for the words name nothing else."""
    moves = _draw_moves(rng, category)
    pairs = _shuffled(rng, draw_pairs(rng, split, len(moves), _names_differ))
    motion = _draw_motion(rng, moves, pairs)
    ground = pick(rng, tuple(BACKGROUNDS))
    alone = tuple(Scene(ground, (Object(s, c, 0.5, 0.5, _CROP),)) for c, s in pairs)
    text = _tell(motion, [f'the {shape}' for _, shape in pairs])
    return Clip(task, category, text, motion, references=alone)


def _draw_twin(rng, task: str, category: str, split: str) -> Clip:
    """What is edited is the first object; of what is left, something moves."""
    moves = _draw_moves(rng, pick(rng, tuple(MOTIONS)))
    if category == 'remove':
        moves = (rng.random() < 0.5, True)
    new, pairs = None, draw_pairs(rng, split, len(moves))
    if category in ('recolour', 'replace'):
        new, *pairs = draw_pairs(rng, split, len(moves) + 1, NOUNS_DIFFER[category])
    source = _draw_motion(rng, moves, pairs)
    ground, first = source.first.background, source.first.objects[0]
    if category == 'background':
        ground = pick(rng, tuple(b for b in BACKGROUNDS if b != ground))
        text = f'change the background to {ground}'
    elif new is None:
        text = f'remove the {first.name}'
    elif category == 'recolour':
        text = f'make the {first.name} {new[0]}'
    else:
        text = f'replace the {first.name} with {phrase(new[0], new[1])}'

    def edited(scene: Scene) -> Scene:
        first, *rest = scene.objects
        if new is not None:
            first = replace(first, colour=new[0], shape=new[1])
        return Scene(ground, tuple(rest) if category == 'remove' else (first, *rest))

    target = Motion(edited(source.first), edited(source.last))
    return Clip(task, category, text, target, source=source)


def _draw_moves(rng, category: str) -> tuple[bool, ...]:
    """Whether each object moves; either one of two stays."""
    return pick(rng, sorted({*itertools.permutations(MOTIONS[category])}))


def _draw_motion(rng, moves: tuple[bool, ...], pairs) -> Motion:
    """Uniform over all ways in which objects can go and never meet."""
    courses = pick(rng, _courses(moves))
    first, last = (
        tuple(Object(s, c, x, y, RADIUS) for (c, s), (x, y) in zip(pairs, ends, strict=True))
        for ends in zip(*courses, strict=True)
    )
    ground = pick(rng, tuple(BACKGROUNDS))
    return Motion(Scene(ground, first), Scene(ground, last))


@functools.cache
def _courses(moves: tuple[bool, ...]):
    """All [((x, y) at first, (x, y) at last) of each object] that keep objects apart."""
    steps = [*itertools.product(PLACES.values(), repeat=2)]
    going = [(a, b) for a, b in steps if (a[0] == b[0]) != (a[1] == b[1])]
    kinds = [going if moving else [(a, b) for a, b in steps if a == b] for moving in moves]
    return tuple(
        courses
        for courses in itertools.product(*kinds)
        if all(_apart(*pair) for pair in itertools.combinations(courses, 2))
    )


def _apart(one, other) -> bool:
    """Along x or y, at all times: each distance is a straight line, the larger one convex."""
    first, last = (np.subtract(a, b) for a, b in zip(one, other, strict=True))
    between = first + np.linspace(0, 1, 33)[:, None] * (last - first)
    return bool((np.abs(between).max(-1) >= _APART).all())


def _shuffled(rng, pairs):
    return pairs[::-1] if rng.random() < 0.5 else pairs


def _names_differ(pairs) -> bool:
    return len(pairs) == 1 or shapes_differ(pairs)


def _tell(motion: Motion, names: Sequence[str]) -> str:
    """What is where at first and where it goes, and on what ground: little is left to chance."""
    ends = zip(names, motion.first.objects, motion.last.objects, strict=True)
    told = [
        f'{name} is {place(a)}' if a == b else f'{name} moves {place(a)} to {place(b)}'
        for name, a, b in ends
    ]
    return f'{" and ".join(told)}, on {motion.first.background}'


# task -> (categories, how a clip of one is drawn)
CLIPS: Mapping[str, tuple[tuple[str, ...], Callable[..., Clip]]] = {
    't2v': (tuple(MOTIONS), _draw_captioned),
    'i2v': (tuple(MOTIONS), _draw_captioned),
    'v2v': (CLIP_EDITS, _draw_twin),
    'r2v': (tuple(MOTIONS), _draw_referenced),
}
