"""Scores in the shapes world: what both splits ask for, drawn and judged exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metacanvas_jax.data.shapes import SPLITS, Edit, edit_requests, requests
from metacanvas_jax.data.shapes_video import Clip, clip_requests
from metacanvas_jax.evaluate import clips_judge, edits_judge, shapes_judge

Draw = Callable[[list[str], range], np.ndarray]  # (prompts, indices) -> uint8 (B, H, W, 3)
DrawEdits = Callable[[list[Edit], range], np.ndarray]  # the same, of `source` and `instruction`
DrawClips = Callable[[list[Clip], range], np.ndarray]  # (clips, indices) -> (B, F, H, W, 3)


def shapes_score(draw: Draw, *, per_category: int, batch: int, seed: int) -> dict[str, dict]:
    """{split: {'overall': x, category: x, ...}}; `draw` always gets `batch` prompts."""

    def draw_captions(asked, indices):
        return draw([request.caption for request in asked], indices)

    return {
        split: shapes_judge.score(_drawn(draw_captions, asked, batch), asked)
        for split in SPLITS
        for asked in [requests(split, per_category, seed)]
    }


def edits_score(draw: DrawEdits, *, per_category: int, batch: int, seed: int) -> dict[str, dict]:
    """As `shapes_score`, of pictures that are edited."""
    return {
        split: edits_judge.score(_drawn(draw, asked, batch), asked)
        for split in SPLITS
        for asked in [edit_requests(split, per_category, seed)]
    }


def clips_score(
    draw: DrawClips, task: str, *, per_category: int, batch: int, seed: int
) -> dict[str, dict]:
    """As `shapes_score`, of clips of one task: t2v, i2v, v2v or r2v."""
    return {
        split: clips_judge.score(_drawn(draw, asked, batch), asked)
        for split in SPLITS
        for asked in [clip_requests(task, split, per_category, seed)]
    }


def _drawn(draw: Callable[[list[Any], range], np.ndarray], asked: Sequence, batch: int):
    """In batches of one size; the last is filled up, and what is too much left out."""
    full = [*asked, *[asked[-1]] * (-len(asked) % batch)]
    starts = range(0, len(full), batch)
    drawn = [draw(full[start : start + batch], range(start, start + batch)) for start in starts]
    return np.concatenate(drawn)[: len(asked)]
