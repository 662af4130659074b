"""Scores in the shapes world: what both splits ask for, drawn and judged exactly."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metacanvas_jax.data.records import Record
from metacanvas_jax.data.shapes import SPLITS, edit_requests, requests
from metacanvas_jax.data.shapes_video import CLIPS, clip_requests
from metacanvas_jax.data.sources import clip_record, edit_record
from metacanvas_jax.evaluate import clips_judge, edits_judge, shapes_judge

Draw = Callable[[list[Record], range], np.ndarray]  # (records, indices) -> uint8 (B, F, H, W, 3)


@dataclasses.dataclass(frozen=True)
class Exam:
    """What a run is asked at its end, of one task."""

    requests: Callable[[str, int, int], Sequence]  # of a split, so many per category, by a seed
    record: Callable[[Any, Any], Record]  # one of them, with config.data; it may hold the answer
    score: Callable[[np.ndarray, Sequence], dict[str, float]]  # (B, F, H, W, 3) -> shares


def unanswered(record: Record) -> Record:
    """What is shown and said, without what is to come of it."""
    return dataclasses.replace(record, pixels=None, plan='')


def _picture(judge: Callable) -> Callable:
    return lambda clips, asked: judge(clips[:, 0], asked)


_SHAPES = {
    't2i': Exam(
        requests, lambda request, data: Record(request.caption), _picture(shapes_judge.score)
    )
}
_EDITS = {'edit': Exam(edit_requests, edit_record, _picture(edits_judge.score))}
_CLIPS = {
    task: Exam(functools.partial(clip_requests, task), clip_record, clips_judge.score)
    for task in CLIPS
}
# config.evaluate.kind -> {task: exam}
EXAMS: Mapping[str, Mapping[str, Exam]] = {
    'shapes': _SHAPES,
    'edits': _EDITS,
    'clips': _CLIPS,
    'six_tasks': {**_SHAPES, **_EDITS, **_CLIPS},
}


def examine(
    exam: Exam, draw: Draw, data, *, per_category: int, batch: int, seed: int
) -> dict[str, dict]:
    """{split: {'overall': x, category: x, ...}}"""
    result = {}
    for split in SPLITS:
        asked = exam.requests(split, per_category, seed)
        records = [unanswered(exam.record(one, data)) for one in asked]
        result[split] = exam.score(in_batches(draw, records, batch), asked)
    return result


def in_batches(draw: Draw, records: Sequence[Record], batch: int) -> np.ndarray:
    """One program does for all: the last records are filled up, and what is too much left out."""
    filled = [*records, *[records[-1]] * (-len(records) % batch)]
    starts = range(0, len(filled), batch)
    drawn = [draw(filled[at : at + batch], range(at, at + batch)) for at in starts]
    return np.concatenate(drawn)[: len(records)]
