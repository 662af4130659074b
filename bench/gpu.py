"""All benches that want a GPU, one after another, and how their figures stand to the targets.

    python -m bench.gpu [--only PART ...] [--minutes=25] [--tiny] [--folder=bench/results]

Every part is a process with a time limit that writes FOLDER/gpu_PART.json as it goes, and its log
beside it; one that fails or is cut short costs the others nothing. A part begins only where its
limit still fits. FOLDER/gpu.json then holds the targets that could be computed from what is there.
Besides this package they want torch with CUDA and diffusers: without these, ours alone is measured.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Part:
    module: str
    cases: tuple[str, ...]
    seconds: int  # at most


# What says most comes first.
PARTS = {
    'forward_wan': Part('gpu_forward', ('wan',), 150),
    'forward_flux': Part('gpu_forward', ('flux',), 120),
    'train_wan': Part('gpu_train_step', ('wan',), 150),
    'train_wan_plain': Part('gpu_train_step', ('wan_plain',), 150),
    'vae_pictures': Part('gpu_vae', ('dc_ae_512', 'dc_ae_1024', 'flux_decode', 'flux_encode'), 120),
    'vae_wan': Part('gpu_vae', ('wan',), 150),
    'forward_sana': Part('gpu_forward', ('sana_512', 'sana_1024'), 150),
    'train_wan_torch': Part('gpu_train_step', ('wan_torch',), 120),
    'train_flux': Part('gpu_train_step', ('flux',), 120),
    'conv3d': Part('gpu_conv3d', ('level_0', 'level_1', 'level_2', 'level_3'), 90),
    'train_sana': Part('gpu_train_step', ('sana',), 90),
    'train_sana_plain': Part('gpu_train_step', ('sana_plain',), 90),
}


# ------------------------------------------------------------ what is run


def run(name: str, folder: pathlib.Path, *, tiny: bool) -> str:
    """What became of it, in a word or two."""
    part = PARTS[name]
    command = [sys.executable, '-m', f'bench.{part.module}', *part.cases]
    command += [f'--output={folder / f"gpu_{name}.json"}', *(['--tiny'] if tiny else [])]
    command += ['--repeats=1'] if tiny else []
    began, environment = time.monotonic(), {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **os.environ}
    with (folder / f'gpu_{name}.log').open('w') as log:
        try:
            found = subprocess.run(
                command, stdout=log, stderr=log, timeout=part.seconds, cwd=ROOT, env=environment
            )
            outcome = 'done' if found.returncode == 0 else f'exit status {found.returncode}'
        except subprocess.TimeoutExpired:
            outcome = f'cut after {part.seconds} s'
    print(f'{name}: {outcome}, {time.monotonic() - began:.0f} s', flush=True)
    return outcome


# ------------------------------------------------------------ what is wanted


class Figures:
    """What parts have written; KeyError where they have not."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def of(self, part: str, case: str) -> dict[str, Any]:
        try:
            return self.part(part)['cases'][case]
        except OSError as error:
            raise KeyError(part) from error

    def part(self, part: str) -> dict[str, Any]:
        return json.loads((self.folder / f'gpu_{part}.json').read_text())

    def ratio(self, part: str, case: str, peer: str) -> float:
        """To the best of the peers of this kind."""
        found = self.of(part, case)['ratios']
        return max(
            [r for name, r in found.items() if name.startswith(f'ours / {peer}')] or [_none()]
        )

    def overhead(self, part: str, case: str) -> float:
        return self.of(part, case)['ratios']['ours with canvas / ours']

    def of_ceiling(self, part: str, case: str) -> float:
        return self.of(part, case)['tflop_per_s'] / self.part(part)['matmul_tflop_per_s']

    def step(self, part: str, other: str) -> float:
        """One train step over another."""
        ours, theirs = (
            self.of(name, name.removeprefix('train_'))['seconds']['median_s']
            for name in (part, other)
        )
        return ours / theirs

    def planned(self, part: str) -> float:
        found = self.of(part, part.removeprefix('train_'))
        return found['most_gigabytes'] / found['planned_gigabytes']


def _none():
    raise KeyError('no such peer')


# name -> what it is, and the least and the most that it may be (performance.md, P1 to P10)
TARGETS: dict[str, tuple[Callable[[Figures], float], float | None, float | None]] = {
    'P1 FLUX / eager': (lambda f: f.ratio('forward_flux', 'flux', 'diffusers eager'), None, 0.75),
    'P1 FLUX / compiled': (
        lambda f: f.ratio('forward_flux', 'flux', 'diffusers compiled'),
        None,
        1.05,
    ),
    'P1 FLUX, of a matmul': (lambda f: f.of_ceiling('forward_flux', 'flux'), 0.66, None),
    'P2 Wan / eager': (lambda f: f.ratio('forward_wan', 'wan', 'diffusers eager'), None, 0.65),
    'P2 Wan / compiled': (
        lambda f: f.ratio('forward_wan', 'wan', 'diffusers compiled'),
        None,
        1.05,
    ),
    'P2 Wan, of a matmul': (lambda f: f.of_ceiling('forward_wan', 'wan'), 0.68, None),
    'P3 SANA 1024 / eager': (
        lambda f: f.ratio('forward_sana', 'sana_1024', 'diffusers eager'),
        None,
        0.5,
    ),
    'P3 SANA 1024 / compiled': (
        lambda f: f.ratio('forward_sana', 'sana_1024', 'diffusers compiled'),
        None,
        1.1,
    ),
    'P5 Wan step, of a matmul': (lambda f: f.of_ceiling('train_wan', 'wan'), 0.46, None),
    'P5 Wan step / torch': (lambda f: f.step('train_wan_plain', 'train_wan_torch'), None, 0.85),
    'P6 FLUX step, of a matmul': (lambda f: f.of_ceiling('train_flux', 'flux'), 0.45, None),
    'P7 Wan step, canvas / none': (lambda f: f.step('train_wan', 'train_wan_plain'), None, 1.025),
    'P7b Wan, canvas / none': (lambda f: f.overhead('forward_wan', 'wan'), None, 1.02),
    'P7b FLUX, canvas / none': (lambda f: f.overhead('forward_flux', 'flux'), None, 1.015),
    'P7b SANA, canvas / none': (lambda f: f.overhead('forward_sana', 'sana_512'), None, 1.06),
    'P8 DC-AE': (lambda f: f.ratio('vae_pictures', 'dc_ae_1024', 'diffusers'), None, 1.1),
    'P8 FLUX AE': (lambda f: f.ratio('vae_pictures', 'flux_decode', 'diffusers'), None, 1.1),
    'P8 Wan VAE': (lambda f: f.ratio('vae_wan', 'wan', 'diffusers'), None, 1.0),
    'P10 Wan step, most / planned': (lambda f: f.planned('train_wan'), 0.95, 1.05),
}


def standing(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    figures, rows = Figures(folder), {}
    for name, (value, least, most) in TARGETS.items():
        try:
            found = value(figures)
        except (KeyError, TypeError):  # a part is missing, or says why it has no figure
            continue
        met = (least is None or found >= least) and (most is None or found <= most)
        bound = {'at least': least, 'at most': most}
        wanted = {word: number for word, number in bound.items() if number is not None}
        rows[name] = {'found': round(found, 4), **wanted, 'met': met}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=[*PARTS])
    parser.add_argument('--minutes', type=float, default=25)
    parser.add_argument('--tiny', action='store_true', help='in small, also on a CPU')
    parser.add_argument('--folder', type=pathlib.Path, default=ROOT / 'bench/results')
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ends, outcomes = time.monotonic() + 60 * args.minutes, {}
    for name in args.only:
        if time.monotonic() + PARTS[name].seconds > ends:
            outcomes[name] = 'not begun: no time left'
            continue
        outcomes[name] = run(name, folder, tiny=args.tiny)
        text = json.dumps({'parts': outcomes, 'targets': standing(folder)}, indent=2)
        (part := folder / 'gpu.part').write_text(text + '\n')
        part.replace(folder / 'gpu.json')
    print((folder / 'gpu.json').read_text())


if __name__ == '__main__':
    main()
