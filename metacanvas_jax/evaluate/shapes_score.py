"""GenEval in the shapes world: prompts of both splits, drawn and judged exactly."""

from collections.abc import Callable

import numpy as np

from metacanvas_jax.data.shapes import SPLITS, requests
from metacanvas_jax.evaluate.shapes_judge import score

Draw = Callable[[list[str], range], np.ndarray]  # (prompts, indices) -> uint8 (B, H, W, 3)


def shapes_score(draw: Draw, *, per_category: int, batch: int, seed: int) -> dict[str, dict]:
    """{split: {'overall': x, category: x, ...}}; `draw` always gets `batch` prompts."""
    result = {}
    for split in SPLITS:
        asked = requests(split, per_category, seed)
        captions = [request.caption for request in asked]
        captions += captions[-1:] * (-len(captions) % batch)
        images = np.concatenate(
            [
                draw(captions[start : start + batch], range(start, start + batch))
                for start in range(0, len(captions), batch)
            ]
        )
        result[split] = score(images[: len(asked)], asked)
    return result
