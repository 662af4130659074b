"""One run, whatever the number of processes and devices and the way they share the work."""

import os
import pathlib
import shutil
import socket
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx
from test_resume import ROOT, command, config_file, environment, finished, metrics, uninterrupted

from configs import quickstart
from metacanvas_jax.build import build_model
from metacanvas_jax.command import load_config
from metacanvas_jax.pipeline import starting_model
from metacanvas_jax.sharding import RULES, make_mesh, partition_spec
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import start

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
    assert said[1][0] == '', 'only process 0 speaks'


MESHES = [dict(data=4), dict(data=2, fsdp=2), dict(fsdp=4)]


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_two_processes_train_as_one_device(tmp_path, tmp_path_factory, expected, mesh):
    """And from what four devices of two processes saved, one device goes on."""
    args = arguments(tmp_path_factory, tmp_path, mesh)
    two_processes(*args)
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=TOLERANCE)
    if mesh == MESHES[-1]:
        go_on(tmp_path, expected, arguments(tmp_path_factory, tmp_path, dict(fsdp=1)), devices=1)


def test_four_devices_of_one_process(tmp_path, tmp_path_factory, expected):
    """And from what they saved, two go on."""
    finished('train.py', *arguments(tmp_path_factory, tmp_path, dict(fsdp=4)), devices=4)
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=TOLERANCE)
    go_on(tmp_path, expected, arguments(tmp_path_factory, tmp_path, dict(fsdp=2)), devices=2)


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


def bytes_of(state) -> tuple[int, int]:
    """Of all the arrays, and of the parts of them on one device."""
    arrays = jax.tree.leaves(state)
    parts = [array.addressable_shards[0].data.nbytes for array in arrays]
    return sum(array.nbytes for array in arrays), sum(parts)


def test_fsdp_splits_parameters_and_moments(tmp_path_factory):
    config = load_config(str(config_file(tmp_path_factory)))
    mesh = make_mesh(data=2, fsdp=4)
    graphdef, trainable, frozen = starting_model(config, mesh)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer))
    state, where = start(trainable, optimizer, ema=True, mesh=mesh)
    del graphdef
    for part in (state.trainable, state.opt_state, state.ema, frozen):
        whole, here = bytes_of(part)
        # Biases of hidden layers and the like are not split.
        assert whole / 4 <= here < whole / 3
    for array, place in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert array.sharding == place
    kernel = state.trainable['backbone']['patch_embed']['kernel'][...]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 4)


@pytest.mark.parametrize('variant', quickstart.VARIANTS)
def test_every_parameter_has_a_spec(variant):
    config = quickstart.get_config(variant)
    config.weights.mllm = None
    config.mllm.lora.rank = 2 if config.canvas.fuse != 'none' else 0
    model = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
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
