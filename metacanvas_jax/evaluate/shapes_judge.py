"""The judge of the shapes world: reads pictures back into objects and applies GenEval's rules.

Strict in what is asked (exactly the asked objects, nothing else), tolerant of soft edges and noise.
Every pixel is taken as a mixture of the background and one colour: the share of that colour is the
object's coverage, and its sum and mean give place and size below the width of a pixel.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from metacanvas_jax.data.shapes import (
    ARM,
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Request,
    coverage,
)
from metacanvas_jax.types import InputError

UNKNOWN = 'unknown'  # the shape or colour of an object that is none of this world's

# Distances of colours are Euclidean in 0..255; the nearest two of the palette are 110 apart.
_PURE = 60  # a pixel this near to a colour is evidence that the colour is in the picture
_ALIKE = 80  # an object of a colour off the palette is named after one this near
_ON_LINE = 45  # a pixel this near to the line background-colour is a mixture of the two
_FOREGROUND = 60  # a pixel farther than this from the background is not background
_SMOOTHING = ((20.0, 1.0), (5.0, 0.7))  # (noise from which, blur in pixels); linear, as in _fit
_LEAST_BACKGROUND = 0.35  # share of the picture; four largest objects leave 0.59
_LEAST_AREA = 0.008  # share of the picture; smaller things are specks. The least object has 0.034
_LEAST_IOU = 0.85  # with the ideal shape; a square on its tip has 0.84 with a circle
_LEAST_OFFSET = 0.1  # of the centres along the axis of a relation
_SOFTNESS = (0.0, 0.02, 0.03)  # blurs of the ideal shape, in sides of the picture

# Area in squared radii, and how far the centroid lies below the box's centre, in radii.
_MOMENTS = {
    'circle': (np.pi, 0.0),
    'square': (4.0, 0.0),
    'triangle': (2.0, 1 / 3),
    'cross': (4 * (2 * ARM - ARM**2), 0.0),
}


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; units as in `Object`. Colour may also be a neutral one."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def find(image: np.ndarray) -> tuple[Found, ...]:
    """All objects of a uint8 (H, W, 3) picture, left to right; empty without a clear background."""
    return read(image)[1]


def background(image: np.ndarray) -> str | None:
    """The neutral colour that dominates the picture, or None."""
    return read(image)[0]


def judge(image: np.ndarray, request: Request) -> bool:
    """Whether the picture shows exactly what the request's category checks, and nothing else."""
    found = find(image)
    if len(found) != sum(asked.count for asked in request.asked):
        return False
    for asked in request.asked:
        alike = [f for f in found if f.shape == asked.shape and asked.colour in (None, f.colour)]
        if len(alike) != asked.count:
            return False
    if request.relation is None:
        return True
    first, second = (next(f for f in found if f.shape == a.shape) for a in request.asked)
    axis, sign = RELATIONS[request.relation]
    return ((first.x, first.y)[axis] - (second.x, second.y)[axis]) * sign > _LEAST_OFFSET


def score(images, requests) -> dict[str, float]:
    """The share of correct pictures per category; 'overall' is the mean of the six (GenEval)."""
    if len(images) != len(requests):
        raise InputError(
            f'the shapes judge got {len(images)} pictures for {len(requests)} requests; '
            'give one picture per request'
        )
    judged = [(r.category, judge(image, r)) for image, r in zip(images, requests, strict=True)]
    return category_means(CATEGORIES, judged)


def category_means(categories: Sequence[str], judged) -> dict[str, float]:
    """`judged` are (category, correct); the overall mean weighs all categories alike."""
    verdicts = {category: [] for category in categories}
    for category, correct in judged:
        verdicts[category].append(correct)
    missing = [category for category, all_of_it in verdicts.items() if not all_of_it]
    if missing:
        raise InputError(
            f'the shapes score is a mean over {len(categories)} categories, but no request is of '
            f'{", ".join(missing)}; draw them with requests, edit_requests or clip_requests'
        )
    shares = {category: float(np.mean(all_of_it)) for category, all_of_it in verdicts.items()}
    return shares | {'overall': float(np.mean(list(shares.values())))}


def read(image: np.ndarray) -> tuple[str | None, tuple[Found, ...]]:
    """(background, objects), as `background` and `find` give them."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (len(image), len(image), 3):
        raise InputError(
            f'the shapes judge got a picture of {image.dtype} {image.shape}; '
            'give one square picture at a time as uint8 (N, N, 3)'
        )
    pixels = image.astype(np.float32)
    noise = _noise(pixels)
    for least, width in _SMOOTHING:
        if noise > least:
            pixels = ndimage.gaussian_filter(pixels, (width, width, 0))
            break
    name, ground = _ground(pixels)
    if name is None or ground is None:
        return None, ()
    offset = pixels - ground
    foreground = np.sqrt((offset**2).sum(-1)) > _FOREGROUND
    colours = {c: rgb - ground for c, rgb in _CANDIDATES.items() if c != name}
    present, unexplained = _present(offset, foreground, colours)

    found, claimed = [], ~foreground
    least = _LEAST_AREA * foreground.size
    if present:
        shares, misfits = zip(*(_unmix(offset, colours[c]) for c in present), strict=True)
        owner = np.argmin(misfits, 0)
        for i, colour in enumerate(present):
            share = np.where((owner == i) & ~unexplained, shares[i], 0)
            for part, window in _components(share > 0.5, least):
                near = ndimage.binary_dilation(part, _AROUND)
                others = (share[window] > 0.5) & ~part
                if others.any():  # of the same colour, and their soft edges with them
                    near &= part | ~ndimage.binary_dilation(others)
                claimed[window] |= near & ~unexplained[window]
                # A paler or darker colour than asked must not look like a soft edge everywhere.
                full = np.minimum(share[window] / np.quantile(share[window][part], 0.75), 1)
                found.append(_fit(np.where(near, full, 0), window, colour, len(image)))
    for part, window in _components(ndimage.binary_opening(~claimed), least):
        colour = _nearest(np.median(offset[window][part], 0), colours)
        found.append(_fit(part.astype(np.float32), window, colour, len(image)))
    return name, tuple(sorted(found, key=lambda f: (f.x, f.y)))


def _noise(pixels: np.ndarray) -> float:
    """The standard deviation of the noise, from differences that flat ground and edges lack."""
    second = pixels[:-2] - 2 * pixels[1:-1] + pixels[2:]
    second = second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:]
    return float(np.median(np.abs(second))) / (6 * 0.6745)  # 36 = sum of squared weights


def _ground(pixels: np.ndarray) -> tuple[str | None, np.ndarray | None]:
    """The dominant neutral and its colour in this picture."""
    best, colour = None, None
    most = _LEAST_BACKGROUND * pixels[..., 0].size
    for name in BACKGROUNDS:
        alike = ((pixels - _CANDIDATES[name]) ** 2).sum(-1) < _PURE**2
        if alike.sum() >= most:
            most = alike.sum()
            best, colour = name, np.median(pixels[alike], 0)
    return best, colour


def _unmix(offset: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of the colour, distance from the line background-colour), both relative to ground."""
    share = np.clip(offset @ (colour / (colour @ colour)), 0, 1)
    return share, np.sqrt(((offset - share[..., None] * colour) ** 2).sum(-1))


def _present(offset, foreground, colours) -> tuple[list[str], np.ndarray]:
    """The colours in the picture, and the foreground that none of them explains.

    Greedy: the colour with the most pure pixels first, then without all mixtures of it, because
    the edge of red on white is as pink as pink.
    """
    left, present = foreground, []
    pure = {c: ((offset - rgb) ** 2).sum(-1) < _PURE**2 for c, rgb in colours.items()}
    while True:
        votes = {c: np.count_nonzero(mask & left) for c, mask in pure.items()}
        colour = max(votes, key=votes.__getitem__)
        if votes[colour] < _LEAST_AREA / 2 * left.size:
            return present, left
        present.append(colour)
        left = left & (_unmix(offset, colours[colour])[1] > _ON_LINE)
        del pure[colour]


def _nearest(offset: np.ndarray, colours) -> str:
    distances = {c: float(np.linalg.norm(offset - rgb)) for c, rgb in colours.items()}
    colour = min(distances, key=distances.__getitem__)
    return colour if distances[colour] < _ALIKE else UNKNOWN


def _components(mask: np.ndarray, least: float):
    """(mask, window) of every connected part of at least that many pixels, with a rim of three."""
    labels, _ = ndimage.label(mask)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        window = (
            slice(max(rows.start - 3, 0), rows.stop + 3),
            slice(max(columns.start - 3, 0), columns.stop + 3),
        )
        part = labels[window] == number
        if part.sum() >= least:
            yield part, window


def _fit(share: np.ndarray, window, colour: str, size: int) -> Found:
    """The shape of the same area and centroid that overlaps best, if any does well."""
    total = share.sum()
    rows, columns = np.arange(len(share)), np.arange(len(share.T))
    x = (share.sum(0) @ columns / total + window[1].start + 0.5) / size
    y = (share.sum(1) @ rows / total + window[0].start + 0.5) / size
    best = (0.0, UNKNOWN, x, y, np.sqrt(total / np.pi) / size)
    for shape in SHAPES:
        area, below = _MOMENTS[shape]
        radius = np.sqrt(total / area) / size
        top = y - below * radius
        ideal = np.zeros((size, size), np.float32)
        r, c, cover = coverage(shape, x, top, radius, size)
        ideal[r, c] = cover
        ideal = ideal[window]
        for width in _SOFTNESS:
            soft = _blur(len(ideal), width * size) @ ideal @ _blur(len(ideal[0]), width * size)
            common = np.minimum(soft, share).sum()
            best = max(best, (common / (total + soft.sum() - common), shape, x, top, radius))
    iou, shape, *place = best
    return Found(shape if iou >= _LEAST_IOU else UNKNOWN, colour, *map(float, place))


@functools.lru_cache
def _blur(length: int, width: float) -> np.ndarray:
    """The matrix of a Gaussian blur along one axis."""
    steps = np.arange(length)
    weights = np.exp(-((steps[:, None] - steps) ** 2) / (2 * max(width, 1e-3) ** 2))
    return (weights / weights[length // 2].sum()).astype(np.float32)


_AROUND = np.ones((5, 5), bool)  # edges are softer than a pixel
_CANDIDATES = {c: np.array(rgb, np.float32) for c, rgb in (COLOURS | BACKGROUNDS).items()}
