"""The judge of edits in the shapes world: was what was asked done, and is all else as it was?"""

import numpy as np

from metacanvas_jax.data.shapes import EDITS, SIDES, Edit, Object
from metacanvas_jax.evaluate.shapes_judge import Found, category_means, read
from metacanvas_jax.types import InputError

PLACE = 0.08  # how far an object may stray and still be at its place
_SIZE = 0.04  # how far its radius may


def judge_edit(image: np.ndarray, edit: Edit) -> tuple[bool, bool]:
    """(the asked change was made, everything else was kept): objects, places, background."""
    return compare(*read(image), edit)


def compare(ground: str | None, found: tuple[Found, ...], edit: Edit) -> tuple[bool, bool]:
    """As `judge_edit`, of a picture that was read."""
    left = list(found)
    kept = ground == edit.source.background or edit.category == 'background'
    for o in edit.source.objects:
        if o in edit.target.objects:
            match = next((f for f in left if same(f, o) and at_its_place(f, o)), None)
            kept &= match is not None
            if match is not None:
                left.remove(match)

    asked = ground == edit.target.background or edit.category != 'background'
    for o in edit.target.objects:
        if o not in edit.source.objects:
            match = next((f for f in left if same(f, o) and _fulfils(f, o, edit)), None)
            asked &= match is not None
            if match is not None:
                left.remove(match)
    gone = [o for o in edit.source.objects if o not in edit.target.objects]
    still = [f for f in left if any(same(f, o) for o in gone)]
    return bool(asked and not still), bool(kept and len(still) == len(left))


def score(images, edits) -> dict[str, float]:
    """The share of edits per category that were made and kept the rest; 'overall' is their mean.

    'asked' and 'kept' are the shares of all edits that did the one and the other.
    """
    if len(images) != len(edits):
        raise InputError(
            f'the judge of edits got {len(images)} pictures for {len(edits)} edits; '
            'give one picture per edit'
        )
    verdicts = [judge_edit(image, edit) for image, edit in zip(images, edits, strict=True)]
    judged = [(edit.category, all(both)) for edit, both in zip(edits, verdicts, strict=True)]
    asked, kept = np.mean(verdicts, 0)
    return category_means(EDITS, judged) | {'asked': float(asked), 'kept': float(kept)}


def same(f: Found, o: Object) -> bool:
    return (f.shape, f.colour) == (o.shape, o.colour)


def at_its_place(f: Found, o: Object) -> bool:
    return bool(np.hypot(f.x - o.x, f.y - o.y) <= PLACE and abs(f.radius - o.radius) <= _SIZE)


def _fulfils(f: Found, o: Object, edit: Edit) -> bool:
    """Whether an object of the right kind is where the edit wants it."""
    if edit.category == 'add':
        return True
    if edit.category == 'move':
        axis, sign = SIDES[edit.instruction.split()[-1]]
        at, aside = ((f.x, f.y - o.y), (f.y, f.x - o.x))[axis]
        return (at - 0.5) * sign > 1 / 6 and abs(aside) <= PLACE
    return at_its_place(f, o)
