"""Laws of the judge of edits.

Measured over 600 edits of both splits, share of made ones judged right at 32 / 64 pixels: 1.000 /
1.000 clean, at noise of 8 and 16 (of 255), at a blur of 1.0 pixel and at both 1.0 and noise 8;
0.995 / 0.993 at noise of 32.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from metacanvas_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    EDITS,
    PLACES,
    SPLITS,
    ShapeEdits,
    edit_requests,
    render,
)
from metacanvas_jax.evaluate.edits_judge import judge_edit, score
from metacanvas_jax.evaluate.shapes_score import EXAMS, examine
from metacanvas_jax.types import InputError
from tests.test_shapes_judge import DISTURBANCES

RECORDS = [ShapeEdits(11, split)[i] for split in SPLITS for i in range(40)]


def other(*scenes):
    """An object's looks that no scene has, in a colour that none has."""
    colours = {o.colour for scene in scenes for o in scene.objects}
    return next(c for c in COLOURS if c not in colours)


@pytest.mark.parametrize(
    ('name', 'size'), [('clean', 32), ('clean', 64), ('noise 8', 32), ('blur 1.0', 32)]
)
def test_edits_are_judged_by_change_and_by_rest(name, size):
    disturb = DISTURBANCES.get(name, (lambda image: image, 1))[0]
    made = [judge_edit(disturb(render(e.target, size)), e) == (True, True) for e in RECORDS]
    not_made = [judge_edit(disturb(render(e.source, size)), e) == (False, True) for e in RECORDS]
    assert min(np.mean(made), np.mean(not_made)) >= (0.95 if name.startswith('noise') else 1)


def test_what_spoils_the_rest_is_not_kept():
    """An object gone, of another colour, elsewhere, smaller; one more; another background."""
    tried = Counter()
    for e in RECORDS:
        spoiled = {}
        taken = {(o.x, o.y) for scene in (e.source, e.target) for o in scene.objects}
        free = [at for at in PLACES.values() if at not in taken]
        for i, o in enumerate(e.target.objects):
            if o not in e.source.objects:
                continue
            rest = tuple(p for j, p in enumerate(e.target.objects) if j != i)
            colour = other(e.source, e.target)
            spoiled['gone'] = rest
            spoiled['colour'] = (*rest, replace(o, colour=colour))
            spoiled['smaller'] = (*rest, replace(o, radius=0.7 * o.radius))
            if free:
                x, y = free[0]
                spoiled['elsewhere'] = (*rest, replace(o, x=x, y=y))
                spoiled['one more'] = (*e.target.objects, replace(o, x=x, y=y, colour=colour))
        for name, objects in spoiled.items():
            image = render(replace(e.target, objects=objects), 32)
            assert judge_edit(image, e) == (True, False), (name, e)
            tried[e.category, name] += 1
        if e.category != 'background':
            ground = next(b for b in BACKGROUNDS if b != e.target.background)
            assert judge_edit(render(replace(e.target, background=ground), 32), e) == (True, False)
    kinds = {name for _, name in tried}
    assert len(kinds) == 5
    assert all(tried[category, name] > 2 for category in EDITS for name in kinds)


def test_what_was_not_asked_is_not_made():
    """The edit half done or done otherwise, all else kept."""
    tried = Counter()
    for e in RECORDS:
        wrong = []
        if e.category == 'background':
            ground = next(
                b for b in BACKGROUNDS if b not in (e.source.background, e.target.background)
            )
            wrong = [replace(e.target, background=ground)]
        else:
            news = [o for o in e.target.objects if o not in e.source.objects]
            kept = tuple(o for o in e.target.objects if o in e.source.objects)
            for o in news:
                colour = other(e.source, e.target)
                looks = [replace(o, colour=colour)]
                if e.category == 'move':  # to the corner across
                    old = next(p for p in e.source.objects if p not in e.target.objects)
                    across = replace(o, x=1 - old.x, y=1 - old.y)
                    if (across.x, across.y) not in {(p.x, p.y) for p in kept}:
                        looks = [across]
                wrong += [replace(e.target, objects=(*kept, look)) for look in looks]
        for scene in wrong:
            assert not judge_edit(render(scene, 32), e)[0], e
            tried[e.category] += 1
    assert min(tried[c] for c in EDITS if c != 'remove') > 5


def test_scores_are_means_of_categories():
    edits = edit_requests('held_out', 2, 0)
    images = [render(e.target, 32) for e in edits]
    assert score(images, edits) == dict.fromkeys((*EDITS, 'overall', 'asked', 'kept'), 1.0)
    images = [render(e.source if e.category == 'move' else e.target, 32) for e in edits]
    scores = score(images, edits)
    assert (scores['move'], scores['add'], scores['kept']) == (0, 1, 1)
    assert scores['overall'] == scores['asked'] == pytest.approx(5 / 6)
    with pytest.raises(InputError, match='1 pictures for 12'):
        score(images[:1], edits)
    with pytest.raises(InputError, match='no request is of replace, recolour, move, background'):
        score(images[:4], edits[:4])


def test_requests_are_balanced_and_not_the_training_stream():
    for split in SPLITS:
        asked = edit_requests(split, 5, 0)
        assert Counter(e.category for e in asked) == dict.fromkeys(EDITS, 5)
        assert asked == edit_requests(split, 5, 0)
        assert asked != edit_requests(split, 5, 1)
        assert not {*map(repr, asked)} & {repr(ShapeEdits(0, split)[i]) for i in range(300)}


def test_both_splits_are_drawn_in_batches_of_one_size():
    seen, told = [], []
    asked = [e for split in SPLITS for e in padded(edit_requests(split, 2, 3), 15)]

    def draw(records, indices):
        seen.extend(indices)
        told.extend(records)
        edits = asked[len(told) - 5 : len(told)]
        assert [r.text for r in records] == [e.instruction for e in edits]
        return np.stack([render(e.target, 32)[None] for e in edits])

    exam, data = EXAMS['edits']['edit'], SimpleNamespace(size=32)
    scores = examine(exam, draw, data, per_category=2, batch=5, seed=3)
    assert {split: s['overall'] for split, s in scores.items()} == dict.fromkeys(SPLITS, 1.0)
    assert seen == [*range(15)] * 2
    assert all(r.pixels is None and not r.plan and r.source is not None for r in told)


def padded(edits, n):
    return [*edits, *[edits[-1]] * (n - len(edits))]
