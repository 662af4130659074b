"""The benches that want a GPU run in small on a CPU; what they find is set against the targets."""

import json
from typing import Any

import pytest

from bench import gpu, gpu_conv3d, gpu_forward, gpu_train_step, gpu_vae, side_by_side


def ran(found: dict[str, Any], peer: str | None = None) -> bool:
    """Ours, and theirs beside it."""
    seconds = found['seconds'] if peer else {'ours': found['seconds']}
    return all(isinstance(seconds[name], dict) for name in seconds) and (peer or 'ours') in seconds


@pytest.mark.slow
def test_forward():
    found = gpu_forward.measured('wan', tiny=True, repeats=1)
    assert ran(found, 'diffusers eager cpu')
    assert {'ours', 'ours with canvas'} < found['seconds'].keys()
    assert found['latents'] == [1, 5, 4, 6, 12]


@pytest.mark.slow
def test_convolution():
    """All ways make the same numbers, or it says so."""
    found = gpu_conv3d.measured('level_1', tiny=True, repeats=1)
    assert ran(found, 'torch conv3d')
    assert 0 < found['relative_error'] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('case', gpu_forward.CASES)
def test_every_forward(case):
    assert ran(gpu_forward.measured(case, tiny=True, repeats=1), 'diffusers eager cpu')


@pytest.mark.slow
@pytest.mark.parametrize('case', gpu_vae.CASES)
def test_every_autoencoder(case):
    assert ran(gpu_vae.measured(case, tiny=True, repeats=1), 'diffusers eager')


@pytest.mark.slow
@pytest.mark.parametrize('case', gpu_train_step.CASES)
def test_every_train_step(case):
    assert ran(gpu_train_step.measured(case, tiny=True, repeats=1))


def test_what_fails_is_said(capsys):
    def fails() -> None:
        raise RuntimeError('out of memory')

    found = side_by_side.measure({'ours': lambda: None, 'theirs': fails}, 3)
    assert found['theirs'] == 'RuntimeError: out of memory'
    assert found['ours']['repeats'] == 3
    assert side_by_side.ratios(found) == {}
    assert 'out of memory' in capsys.readouterr().err


def test_parts(tmp_path, monkeypatch):
    """One that is cut short or fails is named; the others are there."""
    parts = {
        'good': gpu.Part('record', (), 60),
        'bad': gpu.Part('nowhere', (), 60),
        'slow': gpu.Part('record', (), 0),
    }
    monkeypatch.setattr(gpu, 'PARTS', parts)
    found = [gpu.run(name, tmp_path, tiny=True) for name in parts]
    assert found == ['done', 'exit status 1', 'cut after 0 s']
    assert 'nowhere' in (tmp_path / 'gpu_bad.log').read_text()
    for part in gpu.PARTS.values():
        assert part.seconds <= 600
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 25 * 60


def test_targets(tmp_path):
    """Of figures that are there: against the better of two peers, and between parts."""
    assert gpu.standing(tmp_path) == {}

    def write(part: str, case: str, **found) -> None:
        text = json.dumps({'matmul_tflop_per_s': 800.0, 'cases': {case: found}})
        (tmp_path / f'gpu_{part}.json').write_text(text)

    ratios = {'ours / diffusers eager cudnn': 0.7, 'ours / diffusers eager flash': 0.6}
    ratios |= {'ours with canvas / ours': 1.01}
    write('forward_wan', 'wan', ratios=ratios, tflop_per_s=600.0)
    write('train_wan', 'wan', seconds={'median_s': 4.1}, most_gigabytes=99, planned_gigabytes=100)
    write('train_wan_plain', 'wan_plain', seconds={'median_s': 4.0})
    write('train_wan_torch', 'wan_torch', seconds='OutOfMemoryError: 150 GB')
    found = {name: (row['found'], row['met']) for name, row in gpu.standing(tmp_path).items()}
    assert found == {
        'P2 Wan / eager': (0.7, False),
        'P2 Wan, of a matmul': (0.75, True),
        'P7 Wan step, canvas / none': (1.025, True),
        'P7b Wan, canvas / none': (1.01, True),
        'P10 Wan step, most / planned': (0.99, True),
    }
