"""Variants of the quickstart at one budget, such as Section 5.1's: text, MetaQuery and MetaCanvas.

    for v in sana no_canvas metaquery; do
        python train.py --config configs/quickstart.py:$v --workdir runs/$v
    done
    python -m bench.quickstart_variants quickstart_variants runs/sana runs/no_canvas runs/metaquery

Writes bench/results/NAME.json, scores and losses, and docs/NAME.png, where NAME comes first; where
runs have several tasks, NAME:TASK draws the loss of one.
"""

import json
import os
import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.record import record
from metacanvas_jax.data.shapes import SPLITS

EVERY = 100  # steps of which the mean is taken
SIZE, LEFT, TOP = (640, 320), 48, 12
COLOURS = ('#1f5fbf', '#c0392b', '#1e8449', '#8e44ad')


def loss_curves(workdir: pathlib.Path) -> dict[str, list[float]]:
    """{loss: means}, of all steps and of those of each task where there are several."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    parts = [lines[i : i + EVERY] for i in range(0, len(lines) - EVERY + 1, EVERY)]
    names = sorted({name for line in lines for name in line if name.startswith('loss')})
    return {
        name: [round(float(np.mean([x[name] for x in part if name in x])), 4) for part in parts]
        for name in names
    }


def overall(score: dict, split: str) -> float:
    """Of a run of several tasks their mean."""
    tables = [score] if split in score else [t for t in score.values() if isinstance(t, dict)]
    return float(np.mean([table[split]['overall'] for table in tables]))


def plot(curves: dict[str, list[float]], scores: dict[str, dict]) -> Image.Image:
    """Loss by step, both linear, from 0 to a ceiling over all but the first two means."""
    image = Image.new('RGB', SIZE, 'white')
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    width, height = SIZE[0] - LEFT - 24, SIZE[1] - TOP - 36
    steps = max(map(len, curves.values()))
    ceiling = 0.05 * np.ceil(20 * max(max(losses[2:], default=0.05) for losses in curves.values()))

    def at(step: float, loss: float) -> tuple[float, float]:
        return LEFT + width * step / steps, TOP + height * (1 - min(loss, ceiling) / ceiling)

    for loss in np.linspace(0, ceiling, 6):
        draw.line([at(0, loss), at(steps, loss)], fill='#dddddd')
        draw.text((8, at(0, loss)[1] - 7), f'{loss:.2f}', fill='black', font=font)
    for step in range(0, steps + 1, 5):
        below = at(step, 0)[0], TOP + height + 4
        draw.text(below, f'{step * EVERY}', fill='black', font=font, anchor='ma')
    draw.text((LEFT + width // 2 - 60, TOP + height + 20), 'loss by step', fill='black', font=font)
    for i, (name, losses) in enumerate(curves.items()):
        points = [at(step + 1, loss) for step, loss in enumerate(losses)]
        draw.line(points, fill=COLOURS[i], width=2)
        told = ' / '.join(f'{overall(scores[name], split):.2f}' for split in SPLITS)
        draw.text((SIZE[0] - 230, TOP + 6 + 16 * i), f'{name}: {told}', fill=COLOURS[i], font=font)
    return image


def main(name: str, *folders: str) -> None:
    name, _, task = name.partition(':')
    workdirs = {pathlib.Path(folder).name: pathlib.Path(folder) for folder in folders}
    losses = {variant: loss_curves(workdir) for variant, workdir in workdirs.items()}
    scores = {n: json.loads((w / 'score.json').read_text()) for n, w in workdirs.items()}
    rows = {n: {'score': scores[n], **losses[n]} for n in workdirs}
    drawn = f'loss_{task}' if task else 'loss'
    shown = {n: score[task] if task else score for n, score in scores.items()}
    plot({n: losses[n][drawn] for n in workdirs}, shown).save(f'docs/{name}.png')
    result = {'what': 'configs/quickstart.py', 'steps_of_a_mean': EVERY, 'runs': rows}
    output = f'bench/results/{name}.json'
    record(output, result, load=os.getloadavg()[0], packages=('jax', 'flax'))


if __name__ == '__main__':
    main(*sys.argv[1:])
