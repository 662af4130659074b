"""A run that is killed or preempted ends with the bits of one that is not.

`config_file`, `environment`, `command`, `once` and `finished` start tiny runs for other tests too.
"""

import fcntl
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12
CONFIG = f"""
from configs import quickstart

def get_config(variant: str = 'sana'):
    config = quickstart.get_config(variant)
    config.steps = {STEPS}
    config.batch_size = 8
    config.context.update(hidden=32, dropout=0.3)
    config.canvas.update(grid=(2, 2), stride=4, head_dim=32)
    config.backbone.update(num_attention_heads=2, num_layers=1, num_cross_attention_heads=2)
    config.prompt.update(buckets=(64, 96), plan_tokens=8)
    config.optimizer.update(warmup_steps=2, cooldown_steps=0)
    config.checkpoint.update(every=3, keep=2)
    config.log.every = 1
    config.sample.update(every=0, steps=3)
    config.evaluate.kind = 'none'
    return config
"""


def shared(factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that the workers of one pytest call have in common."""
    base = factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'shared'
    folder.mkdir(exist_ok=True)
    return folder


def once(factory: pytest.TempPathFactory, name: str, make: Callable) -> pathlib.Path:
    """The folder `name`, filled by `make` in the first worker that asks; the others wait for it."""
    folder = shared(factory) / name
    with folder.with_suffix('.lock').open('a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'made').exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / 'made').touch()
    return folder


def config_file(factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = once(factory, 'config', lambda folder: (folder / 'tiny.py').write_text(CONFIG))
    return folder / 'tiny.py'


def environment(devices: int) -> dict[str, str]:
    """Of a process with this many devices."""
    here = f'--xla_force_host_platform_device_count={devices}'
    # As if every program were worth keeping on the disk.
    least = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    flags = f'{os.environ["XLA_FLAGS"]} {here}'  # the last one holds
    return {**os.environ, **least, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}


def command(script: str, *args: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, args)]


def finished(script: str, *args: object, devices: int = 1) -> subprocess.CompletedProcess:
    """What a command says that must succeed."""
    done = subprocess.run(
        command(script, *args),
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def uninterrupted(factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a whole run on one device."""

    def make(folder: pathlib.Path) -> None:
        done = finished('train.py', f'--config={config_file(factory)}', f'--workdir={folder}')
        (folder / 'stdout').write_text(done.stdout)
        (folder / 'stderr').write_text(done.stderr)

    return once(factory, 'uninterrupted', make)


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------- the bits of a run


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Starts the run in `tmp_path`, or goes on with it."""
    running = []
    config = f'--config={config_file(tmp_path_factory)}'

    def start(*args: str) -> subprocess.Popen:
        run = subprocess.Popen(
            command('train.py', config, f'--workdir={tmp_path}', *args),
            env=environment(1),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        running.append(run)
        return run

    with tempfile.TemporaryFile('w+') as stderr:
        yield start
        for run in running:
            run.kill()
            run.wait()


def read_to(run: subprocess.Popen, step: int) -> list[str]:
    """The lines that the run prints up to that of `step`."""
    lines = []
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if line.startswith(f'step {step}/'):
            return lines
    pytest.fail(f'the run ended before step {step}: {lines}')


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: bits} of the last checkpoint; its step is one of them."""
    step = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    folder = workdir / 'checkpoints' / str(step)
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(folder / 'state').item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        state = reader.restore(folder / 'state', restore_args=restore)
    return {name: np.asarray(value) for name, value in state.items()}


def digests(workdir: pathlib.Path) -> dict:
    record = workdir / f'checkpoints/{STEPS}/record/metadata'
    return json.loads(record.read_text())['arrays']


def assert_same_run(left: pathlib.Path, right: pathlib.Path) -> None:
    assert (left / 'metrics.jsonl').read_bytes() == (right / 'metrics.jsonl').read_bytes()
    ours, theirs = arrays(left), arrays(right)
    assert int(ours['step']) == STEPS
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert digests(left) == digests(right)


def test_what_a_run_leaves(tmp_path_factory):
    run = uninterrupted(tmp_path_factory)
    assert [line['step'] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert len({line['loss'] for line in metrics(run)}) == STEPS
    names = arrays(run)
    learned = {name.split('.')[1] for name in names if name.startswith('trainable.')}
    assert learned == {'backbone', 'canvas', 'context', 'mllm'}  # the LoRA
    assert any(name.startswith('opt_state.') for name in names)
    assert any(name.startswith('ema.') for name in names)
    # No carriage returns and no cursor movements where nobody watches.
    said = (run / 'stdout').read_text()
    assert said.count('\nstep ') == STEPS
    assert not {'\r', '\x1b'} & set(said + (run / 'stderr').read_text())
    assert sorted(map(int, os.listdir(run / 'checkpoints'))) == [STEPS - 3, STEPS]
    files = {'.lock', 'checkpoints', 'config.json', 'metrics.jsonl', 'timing.jsonl'}
    assert set(os.listdir(run)) - {'stdout', 'stderr', 'made'} == files | {'versions.json'}


def test_killed_again_and_again(tmp_path, tmp_path_factory, start):
    reference = uninterrupted(tmp_path_factory)
    resumed = []
    rng = random.Random(1)
    # The save at step 6 waits for that of step 3: whoever sees step 7 can be resumed.
    for step in (rng.randrange(2, 7), rng.randrange(7, STEPS - 2)):
        run = start()
        lines = read_to(run, step)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert run.returncode == -signal.SIGKILL
        resumed += [line for line in lines if line.startswith('resumed from step ')]
    run = start()
    out, _ = run.communicate()
    assert run.returncode == 0
    resumed += [line for line in out.splitlines() if line.startswith('resumed from step ')]
    assert resumed, 'no run was killed after its first checkpoint'
    assert_same_run(tmp_path, reference)


def test_preempted(tmp_path, tmp_path_factory, start):
    reference = uninterrupted(tmp_path_factory)
    run = start('--config.checkpoint.every=100')  # nothing but the signal makes it save
    read_to(run, 5)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate()
    assert run.returncode == 0
    *_, last = out.splitlines()
    stopped = int(last.removeprefix('preempted at step ').split(';')[0])
    # It stops with the step at hand.
    assert 5 <= stopped <= 8
    assert stopped - 5 == sum(line.startswith('step ') for line in out.splitlines())
    assert len(metrics(tmp_path)) == stopped
    assert os.listdir(tmp_path / 'checkpoints') == [str(stopped)]
    run = start()
    out, _ = run.communicate()
    assert run.returncode == 0
    assert f'resumed from step {stopped}\n' in out
    assert f'\nstep {stopped + 1}/' in out
    assert f'\nstep {stopped}/' not in out
    assert_same_run(tmp_path, reference)
