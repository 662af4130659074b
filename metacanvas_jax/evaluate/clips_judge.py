"""The judge of clips of the shapes world: the judge of its pictures in every frame, and over time.

A clip is right when every check of its task holds:

    t2v    objects      in each frame those asked and no others, on one background throughout
           motion       each goes where it should, in a straight line at constant speed
    i2v    first        the first frame shows what was given, where it was
           objects, motion: as above, and from the places in the given picture
    v2v    asked, kept  in each frame, as edits_judge.py says of a picture
    r2v    references   each object that was shown, in each frame, and no others
           motion

Flicker is measured beside it: how much pixels change from frame to frame where nothing moves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metacanvas_jax.data.shapes import Edit, Scene, render
from metacanvas_jax.data.shapes_video import Clip, Motion, categories, shares
from metacanvas_jax.evaluate.edits_judge import PLACE, at_its_place, compare, same
from metacanvas_jax.evaluate.shapes_judge import Found, category_means, read
from metacanvas_jax.types import InputError

_WAY = 2 * PLACE  # how far an object may end from where its way would have led, along either axis
_EDGE = 1.5 / 32  # soft edges around an object that moves
_FIRST = 8  # changes from frame to frame that are the first ones: two latent frames

Seen = Sequence[tuple[str | None, tuple[Found, ...]]]  # (background, objects) of each frame


@dataclass(frozen=True)
class Verdict:
    checks: Mapping[str, bool]
    frames: float  # the share of frames with the objects asked, and no others
    flicker_first: float  # mean absolute change of a pixel's value, 0..255
    flicker_later: float
    first_frame: float  # mean absolute difference to the first frame of the record, 0..255

    @property
    def right(self) -> bool:
        return all(self.checks.values())


def judge(frames_FHWC: np.ndarray, clip: Clip) -> Verdict:
    """Of a uint8 clip of any 4 n + 1 frames from 5 on."""
    frames = np.asarray(frames_FHWC)
    if frames.ndim != 4 or len(frames) < 5:
        raise InputError(
            f'the judge of clips got an array of {frames.shape}; '
            'give one clip at a time as (F, N, N, 3), at least 5 frames of it'
        )
    seen = [read(frame) for frame in frames]
    first, later = flicker(frames, seen, clip.motion)
    given = render(clip.motion.first, len(frames[0]))
    return Verdict(
        checks=_CHECKS[clip.task](seen, clip),
        frames=float(np.mean([_shows(found, clip.motion.first) for _, found in seen])),
        flicker_first=first,
        flicker_later=later,
        first_frame=float(np.abs(frames[0].astype(np.float32) - given).mean()),
    )


def score(videos, clips: Sequence[Clip]) -> dict[str, float]:
    """The share of right clips per category of their task; 'overall' is the mean of categories.

    Beside them the share of each check, and the means of what a verdict measures.
    """
    if len(videos) != len(clips) or len({clip.task for clip in clips}) != 1:
        raise InputError(
            f'the judge of clips got {len(videos)} videos for {len(clips)} clips of '
            f'{len({clip.task for clip in clips})} tasks; give one video per clip, of one task'
        )
    verdicts = [judge(video, clip) for video, clip in zip(videos, clips, strict=True)]
    judged = [(clip.category, v.right) for clip, v in zip(clips, verdicts, strict=True)]
    checks = {name: np.mean([v.checks[name] for v in verdicts]) for name in verdicts[0].checks}
    measured = {
        name: np.mean([getattr(v, name) for v in verdicts])
        for name in ('frames', 'flicker_first', 'flicker_later')
    }
    if clips[0].task == 'i2v':
        measured['first_frame'] = np.mean([v.first_frame for v in verdicts])
    told = {name: float(value) for name, value in (checks | measured).items()}
    return category_means(categories(clips[0].task), judged) | told


def flicker(frames_FHWC: np.ndarray, seen: Seen, motion: Motion) -> tuple[float, float]:
    """(in the first latent frames, in those after them), outside of all that is to move."""
    size = len(frames_FHWC[0])
    centres = (np.arange(size) + 0.5) / size
    ends = zip(motion.first.objects, motion.last.objects, strict=True)
    movers = [a for a, b in ends if a != b]
    still_FHW = np.ones((len(frames_FHWC), size, size), bool)
    for still_HW, (_, found) in zip(still_FHW, seen, strict=True):
        for f in found:
            if any(same(f, o) for o in movers):
                near = f.radius + _EDGE
                box = np.ix_(np.abs(centres - f.y) < near, np.abs(centres - f.x) < near)
                still_HW[box] = False
    change_FHW = np.abs(np.diff(frames_FHWC.astype(np.float32), axis=0)).mean(-1)
    both_FHW = still_FHW[1:] & still_FHW[:-1]
    change_F = (change_FHW * both_FHW).sum((1, 2)) / np.maximum(both_FHW.sum((1, 2)), 1)
    first = min(_FIRST, len(change_F) // 2)
    return float(change_F[:first].mean()), float(change_F[first:].mean())


def _caption_checks(seen: Seen, clip: Clip) -> dict[str, bool]:
    return {'objects': _objects(seen, clip), 'motion': _goes(seen, clip.motion)}


def _first_frame_checks(seen: Seen, clip: Clip) -> dict[str, bool]:
    return {
        'first': _is(*seen[0], clip.motion.first),
        'objects': _objects(seen, clip),
        'motion': _follows(seen, clip.motion),
    }


def _edit_checks(seen: Seen, clip: Clip) -> dict[str, bool]:
    assert clip.source is not None
    verdicts = []
    for (ground, found), share in zip(seen, shares(len(seen)), strict=True):
        edit = Edit(clip.category, clip.text, clip.source.at(share), clip.motion.at(share))
        verdicts.append(compare(ground, found, edit))
    asked, kept = zip(*verdicts, strict=True)
    return {'asked': all(asked), 'kept': all(kept)}


def _reference_checks(seen: Seen, clip: Clip) -> dict[str, bool]:
    return {'references': _objects(seen, clip), 'motion': _goes(seen, clip.motion)}


_CHECKS: Mapping[str, Callable[[Seen, Clip], dict[str, bool]]] = {
    't2v': _caption_checks,
    'i2v': _first_frame_checks,
    'v2v': _edit_checks,
    'r2v': _reference_checks,
}


def _shows(found: tuple[Found, ...], scene: Scene) -> bool:
    """The scene's kinds of objects, which all differ, and nothing else."""
    kinds = sorted((f.shape, f.colour) for f in found)
    return kinds == sorted((o.shape, o.colour) for o in scene.objects)


def _objects(seen: Seen, clip: Clip) -> bool:
    grounds = {ground for ground, _ in seen}
    shown = all(_shows(found, clip.motion.first) for _, found in seen)
    return shown and len(grounds) == 1 and None not in grounds


def _is(ground: str | None, found: tuple[Found, ...], scene: Scene) -> bool:
    """Everything is there, at its place, and nothing else."""
    placed = all(any(same(f, o) and at_its_place(f, o) for f in found) for o in scene.objects)
    return ground == scene.background and _shows(found, scene) and placed


def _follows(seen: Seen, motion: Motion) -> bool:
    """Every object is at its place in every frame."""
    times = shares(len(seen))
    return all(_is(*frame, motion.at(share)) for frame, share in zip(seen, times, strict=True))


def _goes(seen: Seen, motion: Motion) -> bool:
    """The asked way from wherever it is at first, evenly."""
    times = shares(len(seen))[:, None]
    for a, b in zip(motion.first.objects, motion.last.objects, strict=True):
        path = [(f.x, f.y) for _, found in seen for f in found if same(f, a)]
        if len(path) != len(seen):
            return False
        at_F2 = np.array(path)
        went = at_F2[-1] - at_F2[0]
        strays = np.hypot(*(at_F2 - at_F2[0] - times * went).T)
        if np.abs(went - (b.x - a.x, b.y - a.y)).max() > _WAY or strays.max() > PLACE:
            return False
    return True
