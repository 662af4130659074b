"""One run, whatever the number of processes and devices and the way they share the work."""

import json
import math
import pathlib
import re
import shutil
import socket
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx

from configs import quickstart
from metacanvas_jax.build import build_model
from metacanvas_jax.sharding import RULES, make_mesh, partition_spec, shardings
from tests.test_resume import (
    ROOT,
    command,
    config_file,
    environment,
    finished,
    metrics,
    uninterrupted,
)

STEPS = 6
TOLERANCE = 1e-6


def losses(workdir: pathlib.Path) -> list[float]:
    return [line['loss'] for line in metrics(workdir)][:STEPS]


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    return losses(uninterrupted(tmp_path_factory))


def arguments(factory, workdir, mesh: dict[str, int]) -> list[str]:
    axes = [f'--config.mesh.{name}={size}' for name, size in mesh.items()]
    config = f'--config={config_file(factory)}'
    return [config, f'--workdir={workdir}', f'--config.steps={STEPS}', *axes]


def two_processes(*args: str) -> None:
    """Of two devices each; both must succeed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    together = [f'--coordinator=127.0.0.1:{port}', '--processes=2']
    runs = [
        subprocess.Popen(
            command('train.py', *args, *together, f'--process={i}'),
            env=environment(2),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    assert f'step {STEPS}/' in said[0][0]
    # Gloo's own lines come from several threads, torn at times, so look for ours instead.
    ours = ('objective:', 'trainable', f'step {STEPS}/')
    assert all(word in said[0][0] for word in ours)
    assert not any(word in said[1][0] for word in ours), 'only process 0 speaks'


OTHERS = [
    pytest.param(mesh, marks=pytest.mark.slow) for mesh in (dict(data=4), dict(data=2, fsdp=2))
]


@pytest.mark.parametrize('mesh', [*OTHERS, dict(fsdp=4)], ids=str)
def test_two_processes_train_as_one_device(tmp_path, tmp_path_factory, expected, mesh):
    """And from what four devices of two processes saved, one device goes on, and two."""
    args = arguments(tmp_path_factory, tmp_path, mesh)
    two_processes(*args)
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=TOLERANCE)
    if mesh == dict(fsdp=4):
        assert_split_in_four(tmp_path)
        shutil.copytree(tmp_path, tmp_path / 'again')
        for workdir, mesh in ((tmp_path, dict(fsdp=1)), (tmp_path / 'again', dict(data=2))):
            args = arguments(tmp_path_factory, workdir, mesh)
            go_on(workdir, expected, args, devices=math.prod(mesh.values()))


@pytest.mark.slow
def test_four_devices_of_one_process(tmp_path, tmp_path_factory, expected):
    """And from what they saved, two go on."""
    mesh = dict(data=2, fsdp=2)
    finished('train.py', *arguments(tmp_path_factory, tmp_path, mesh), devices=4)
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=TOLERANCE)
    go_on(tmp_path, expected, arguments(tmp_path_factory, tmp_path, dict(data=2)), devices=2)


def go_on(workdir: pathlib.Path, expected: list[float], args: list[str], *, devices: int) -> None:
    """The second half of a run once more, with other devices."""
    before = (workdir / 'metrics.jsonl').read_bytes()
    shutil.rmtree(workdir / f'checkpoints/{STEPS}')
    done = finished('train.py', *args, devices=devices)
    half = STEPS // 2
    assert f'resumed from step {half}\n' in done.stdout
    lines = (workdir / 'metrics.jsonl').read_bytes().splitlines()
    assert lines[:half] == before.splitlines()[:half]
    np.testing.assert_allclose(losses(workdir), expected, rtol=TOLERANCE)
    assert (workdir / f'checkpoints/{STEPS}').is_dir()


def written(workdir: pathlib.Path) -> dict[str, list[tuple[int, ...]]]:
    """{name in the last checkpoint: the shapes of the parts that each process had of it}."""
    result = {}
    for file in (workdir / f'checkpoints/{STEPS}/state/array_metadatas').iterdir():
        for entry in json.loads(file.read_text())['array_metadatas']:
            array = entry['array_metadata']
            result.setdefault(array['param_name'], []).append(tuple(array['write_shape']))
    return result


def assert_split_in_four(workdir: pathlib.Path) -> None:
    """Parameters, moments and averages lay in quarters on their devices when they were saved."""
    record = json.loads((workdir / f'checkpoints/{STEPS}/record/metadata').read_text())
    shapes = {
        name: tuple(int(n) for n in re.findall(r'\d+', array['spec'].split('[')[1]))
        for name, array in record['arrays'].items()
    }
    parts = written(workdir)
    for kind in ('trainable', 'opt_state', 'ema'):
        names = [name for name in parts if name.startswith(f'{kind}.')]
        whole = sum(math.prod(shapes[name]) for name in names)
        here = sum(math.prod(parts[name][0]) for name in names)
        # Biases of hidden layers and the like are not split.
        assert whole / 4 <= here < whole / 3, kind
    name = 'trainable.backbone.patch_embed.kernel.value'
    rows, columns = shapes[name]
    assert parts[name] == [(rows, columns // 4)] * 2


@pytest.mark.parametrize('variant', quickstart.VARIANTS)
def test_every_parameter_has_a_spec(variant):
    config = quickstart.get_config(variant)
    config.weights.mllm = 'random'
    config.mllm.lora.rank = 2 if config.canvas.fuse != 'none' else 0
    model = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    state = nnx.state(model)
    places = shardings(state, make_mesh(data=2, fsdp=4))
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True))
    here = sum(math.prod(place.shard_shape(array.shape)) for array, place in pairs)
    assert here < sum(array.size for array, _ in pairs) / 3
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert len(parameters) > 40
    for path, variable in parameters.items():
        axes = variable.get_metadata('axes', None)
        assert axes is not None, path
        # One more where `stack` put an axis of layers in front.
        assert len(variable.shape) - len(axes) in (0, 1), path
        assert len(partition_spec(variable)) == len(variable.shape), path
        # No axis of a mesh twice, and matrices are split somewhere.
        used = [RULES[name] for name in axes if name is not None and RULES[name] is not None]
        assert len(set(used)) == len(used), path
        if len(axes) == 2 and min(variable.shape) > 48:
            assert used, path
