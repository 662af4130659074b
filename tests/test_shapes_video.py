"""Laws of the shapes world's clips."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from metacanvas_jax.data import shapes, shapes_video
from metacanvas_jax.data.shapes import COLOURS, HELD_OUT, SHAPES, SPLITS, TRAIN_PAIRS
from metacanvas_jax.data.shapes_video import (
    CLIPS,
    MOTIONS,
    ShapeClips,
    clip_requests,
    render_clip,
    shares,
)
from metacanvas_jax.types import InputError

DRAWS = 600
COLOUR, SHAPE = '|'.join(COLOURS), '|'.join(SHAPES)
CORNER = '(north|south)(west|east)'
SENTENCE = re.compile(
    rf'(?:(a|an) ({COLOUR})|(the)) ({SHAPE}) (?:moves {CORNER} to {CORNER}|is {CORNER})'
)
LISTED = re.compile(rf'^{CORNER} (?:({COLOUR}) ({SHAPE})|nothing)$')
STEPS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0, 0))
CASES = [*itertools.product(CLIPS, SPLITS)]
CLIPS_OF = {case: [ShapeClips(0, case[1], case[0])[i] for i in range(DRAWS)] for case in CASES}


@pytest.fixture(params=CASES, ids='-'.join)
def case(request):
    return request.param


def told(text):
    """Sentence -> ([(colour or None, shape, corner at first, at last)], ground), by other means
    than the writer's.
    """
    said, ground = text.split(', on ')
    found = []
    for part in said.split(' and '):
        match = SENTENCE.fullmatch(part)
        assert match, part
        article, colour, the, shape, *at = match.groups()
        assert the or (article == 'an') == (colour[0] in 'aeiou')
        first, last, stays = (tuple(at[i : i + 2]) for i in (0, 2, 4))
        assert first != last or stays != (None, None)
        found.append((colour, shape, *((first, last) if first[0] else (stays, stays))))
    return found, ground


def planned(plan):
    """Plan -> [({corner: (colour, shape)}, ground) of each frame that it tells]."""
    found = []
    for scene in plan.split('. '):
        said, ground = scene.split(', on ')
        listed = [LISTED.findall(words)[0] for words in said.split(', ')]
        assert len({(y, x) for y, x, *_ in listed}) == len(listed) == 4
        found.append(({(y, x): (c, s) for y, x, c, s in listed if c}, ground))
    return found


def corner(o):
    return ('south' if o.y > 0.5 else 'north', 'east' if o.x > 0.5 else 'west')


def steps(motion):
    """Each object's way in corners: (x, y)."""
    return [
        (round((b.x - a.x) / 0.625), round((b.y - a.y) / 0.625))
        for a, b in zip(motion.first.objects, motion.last.objects, strict=True)
    ]


def pairs(scene):
    return [(o.colour, o.shape) for o in scene.objects]


def test_records_depend_on_seed_split_and_index_only(case):
    task, split = case
    data, clips = ShapeClips(0, split, task), CLIPS_OF[case]
    assert [data[i] for i in reversed(range(50))] == clips[49::-1]
    assert data[np.int64(3)] == clips[3]
    other = next(s for s in SPLITS if s != split)
    for others in (ShapeClips(1, split, task), ShapeClips(0, other, task)):
        assert all(clips[i] != others[i] for i in range(50))
    assert len({repr(clip) for clip in clips}) > 0.7 * DRAWS
    assert data[shapes.LENGTH - 1]
    assert len(data) == shapes.LENGTH


def test_objects_go_from_corner_to_corner_and_keep_apart(case):
    corners = set(shapes.PLACES.values())
    for clip in CLIPS_OF[case]:
        for motion in filter(None, (clip.motion, clip.source)):
            assert pairs(motion.first) == pairs(motion.last)
            assert len({*pairs(motion.first)}) == len(motion.first.objects) > 0
            assert motion.first.background == motion.last.background
            ends = [(o.x, o.y) for s in (motion.first, motion.last) for o in s.objects]
            assert {*ends} <= corners
            assert set(steps(motion)) <= {*STEPS}
            assert any(step != (0, 0) for step in steps(motion))
            for share in np.linspace(0, 1, 21):
                for a, b in itertools.combinations(motion.at(share).objects, 2):
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 2 * shapes.RADIUS + 1 / 8
            assert motion.at(0) == motion.first
            at = [[(o.x, o.y) for o in motion.at(share).objects] for share in (0, 0.25, 1)]
            assert np.allclose(at[1], 0.75 * np.array(at[0]) + 0.25 * np.array(at[2]))


@pytest.mark.parametrize('task', ['t2v', 'i2v', 'r2v'])
@pytest.mark.parametrize('split', SPLITS)
def test_captions_tell_the_motion(task, split):
    for clip in CLIPS_OF[task, split]:
        words, ground = told(clip.text)
        assert ground == clip.motion.first.background == clip.motion.last.background
        for at, scene in ((2, clip.motion.first), (3, clip.motion.last)):
            assert [word[at] for word in words] == [corner(o) for o in scene.objects]
        moved = [first != last for *_, first, last in words]
        assert sorted(moved) == sorted(MOTIONS[clip.category])
        assert [shape for _, shape, *_ in words] == [s for _, s in pairs(clip.motion.first)]
        if task == 'r2v':
            assert all(colour is None for colour, *_ in words)
            assert len({shape for _, shape, *_ in words}) == len(words)  # or 'the' would not do
        else:
            assert [colour for colour, *_ in words] == [c for c, _ in pairs(clip.motion.first)]
        assert clip.source is None
        assert bool(clip.references) == (task == 'r2v')


def test_plans_tell_the_first_frame_and_the_last(case):
    for clip in CLIPS_OF[case]:
        ends = clip.motion.first, clip.motion.last
        assert planned(clip.plan) == [
            ({corner(o): (o.colour, o.shape) for o in scene.objects}, scene.background)
            for scene in ends
        ]


@pytest.mark.parametrize('split', SPLITS)
def test_references_show_each_object_alone_and_large(split):
    for clip in CLIPS_OF['r2v', split]:
        shown = [pairs(scene) for scene in clip.references]
        assert shown == [[pair] for pair in pairs(clip.motion.first)]
    grounds = Counter(
        (clip.references[0].background, clip.motion.first.background)
        for clip in CLIPS_OF['r2v', split]
    )
    assert len(grounds) == 9  # it tells nothing of the clip's
    picture = shapes.render(clip.references[0], 32)
    inside = (picture != shapes.BACKGROUNDS[clip.references[0].background]).any(-1)
    for axis in (0, 1):
        assert np.flatnonzero(inside.any(axis))[[0, -1]].tolist() == [4, 27]


@pytest.mark.parametrize('split', SPLITS)
def test_twins_differ_in_what_is_said_only(split):
    for clip in CLIPS_OF['v2v', split]:
        source, target = clip.source, clip.motion
        assert source
        named = re.findall(rf'({COLOUR}) ({SHAPE})', clip.text)
        first = pairs(source.first)[0]
        if clip.category == 'background':
            assert clip.text == f'change the background to {target.first.background}'
            assert target.first.background != source.first.background
            back = [
                replace(s, background=source.first.background) for s in (target.first, target.last)
            ]
            assert back == [source.first, source.last]
            continue
        assert target.first.background == source.first.background
        assert named[0] == first
        rest = [s.objects[clip.category != 'remove' :] for s in (target.first, target.last)]
        assert rest == [source.first.objects[1:], source.last.objects[1:]]
        if clip.category == 'remove':
            assert clip.text == 'remove the {} {}'.format(*first)
            continue
        assert steps(target) == steps(source)
        assert target.first.objects[0].x == source.first.objects[0].x
        colour, shape = pairs(target.first)[0]
        if clip.category == 'recolour':
            assert clip.text == 'make the {} {} {}'.format(*first, colour)
            assert shape == first[1] != colour != first[0]
        else:
            assert named[1] == (colour, shape)
            assert shape != first[1]


def test_held_out_pairs_are_in_every_clip_of_their_split_and_in_no_other(case):
    seen = set()
    for clip in CLIPS_OF[case]:
        shown = {*pairs(clip.motion.first)} | (
            {*pairs(clip.source.first)} if clip.source else set()
        )
        assert bool(shown & {*HELD_OUT}) == (case[1] == 'held_out')
        seen |= shown
    assert seen == {*TRAIN_PAIRS} | ({*HELD_OUT} if case[1] == 'held_out' else set())


def test_clips_are_balanced(case):
    clips = CLIPS_OF[case]
    shares_of = Counter(clip.category for clip in clips)
    known = shapes_video.categories(case[0])
    assert all(abs(shares_of[c] / DRAWS - 1 / len(known)) < 0.07 for c in known)
    ways = Counter(step for clip in clips for step in steps(clip.motion) if step != (0, 0))
    assert all(abs(n / ways.total() - 1 / 4) < 0.07 for n in ways.values())
    if case[0] != 'v2v':
        stays = [steps(c.motion).index((0, 0)) for c in clips if c.category == 'one_stays']
        assert abs(np.mean(stays) - 1 / 2) < 0.15


def test_requests_are_balanced_and_not_the_training_stream(case):
    task, split = case
    asked = clip_requests(task, split, 5, 0)
    assert Counter(c.category for c in asked) == dict.fromkeys(shapes_video.categories(task), 5)
    assert asked == clip_requests(task, split, 5, 0)
    assert asked != clip_requests(task, split, 5, 1)
    rng = shapes.generator(0, 'clips', split, 0)
    assert asked[0] != shapes_video.draw_clip(rng, task, asked[0].category, split)


@pytest.mark.parametrize(('frames', 'size'), [(1, 32), (5, 33), (17, 32), (9, 64)])
def test_frames_are_pictures_of_their_scenes(frames, size):
    for clip in CLIPS_OF['t2v', 'train'][:60]:
        video = render_clip(clip.motion, frames, size)
        assert (video.shape, video.dtype) == ((frames, size, size, 3), np.uint8)
        for share, frame in zip(shares(frames), video, strict=True):
            np.testing.assert_array_equal(frame, shapes.render(clip.motion.at(share), size))
    assert shares(5).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_errors_of_the_caller_are_told():
    motion = CLIPS_OF['t2v', 'train'][0].motion
    with pytest.raises(InputError, match='such as 13 or 17, not 16'):
        render_clip(motion, 16, 32)
    with pytest.raises(InputError, match='such as 1 or 5, not 0'):
        render_clip(motion, 0, 32)
    with pytest.raises(InputError, match=r"unknown task 't2i'.*t2v, i2v, v2v, r2v"):
        ShapeClips(0, 'train', 't2i')
    with pytest.raises(InputError, match='unknown split'):
        clip_requests('t2v', 'test', 1, 0)
    with pytest.raises(InputError, match='unknown category'):
        shapes_video.draw_clip(np.random.default_rng(0), 'v2v', 'one_moves', 'train')
