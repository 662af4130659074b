"""One run per workdir, its config beside it; a polite end on SIGTERM and Ctrl-C."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from metacanvas_jax.train import workdir
from metacanvas_jax.train.preemption import Preemption
from metacanvas_jax.train.workdir import open_workdir, read_config
from metacanvas_jax.types import InputError


def _config(**changes):
    config = ConfigDict(
        {
            'steps': 10,
            'seed': 0,
            'log': {'every': 5},
            'model': {'width': 64, 'sizes': ((1, 2), (3, 4)), 'none': None, 'empty': {}},
            'rate': 1e-3,
            'tasks': (),
        }
    )
    config.update_from_flattened_dict(changes)
    return config.lock()


def test_what_it_writes(tmp_path):
    with open_workdir(tmp_path / 'deep/run', _config()) as path:
        assert path == tmp_path / 'deep/run'
        first = (path / 'config.json').read_bytes()
        versions = json.loads((path / 'versions.json').read_text())
        assert f'pid {os.getpid()} on ' in (path / '.lock').read_text()
    assert versions['jax'] == jax.__version__
    assert versions['devices'] == 8
    assert {'python', 'flax', 'optax', 'grain', 'numpy', 'device', 'commit'} <= versions.keys()
    assert sorted(os.listdir(path)) == ['.lock', 'config.json', 'versions.json']
    with open_workdir(path, _config()):
        assert (path / 'config.json').read_bytes() == first


def test_the_config_comes_back(tmp_path):
    with open_workdir(tmp_path, _config()):
        pass
    step = tmp_path / 'checkpoints/20'
    step.mkdir(parents=True)
    for path in (tmp_path, step, str(step)):
        config = read_config(path)
        assert config.to_dict() == _config().to_dict()
        assert isinstance(config.to_dict()['model']['sizes'][0], tuple)
        assert config.is_locked


def test_no_config(tmp_path):
    with pytest.raises(InputError, match='no such workdir'):
        read_config(tmp_path / 'x')
    with pytest.raises(InputError, match='neither a workdir'):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{"a": ')
    with pytest.raises(InputError, match='not valid JSON'):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('[]')
    with pytest.raises(InputError, match='want a JSON object, got list'):
        read_config(tmp_path)


def test_free_entries_may_change(tmp_path):
    with open_workdir(tmp_path, _config()):
        pass
    with open_workdir(tmp_path, _config(**{'steps': 20, 'log.every': 1})):
        assert read_config(tmp_path).steps == 20


def test_others_may_not(tmp_path):
    with open_workdir(tmp_path, _config()):
        pass
    other = _config(**{'model.width': 32, 'seed': 1, 'steps': 3})
    with pytest.raises(InputError) as caught, open_workdir(tmp_path, other):
        pass
    message = str(caught.value)
    assert 'model.width: 64 there, 32 now; seed: 0 there, 1 now' in message
    assert 'steps' not in message
    assert read_config(tmp_path).seed == 0
    with pytest.raises(InputError, match='steps: 10 there'), open_workdir(tmp_path, other, free=()):
        pass


def test_one_run_at_a_time(tmp_path):
    with open_workdir(tmp_path, _config()):
        words = f'is in use by pid {os.getpid()} on '
        with pytest.raises(InputError, match=words), open_workdir(tmp_path, _config()):
            pass
        assert f'pid {os.getpid()} on ' in (tmp_path / '.lock').read_text()
    with open_workdir(tmp_path, _config()):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        'import fcntl, sys, time\n'
        'lock = open(sys.argv[1], "a+")\n'
        'fcntl.flock(lock, fcntl.LOCK_EX)\n'
        'lock.write("pid 1 on there"); lock.flush()\n'
        'print("locked", flush=True)\n'
        'time.sleep(60)\n'
    )
    command = [sys.executable, '-S', '-c', code, str(tmp_path / '.lock')]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match='in use by pid 1 on there'):
            open_workdir(tmp_path, _config()).__enter__()
        other.kill()
    with open_workdir(tmp_path, _config()):
        assert f'pid {os.getpid()} on ' in (tmp_path / '.lock').read_text()


def test_bad_places_and_values(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot create workdir'):
        open_workdir(tmp_path / 'file', _config()).__enter__()
    with pytest.raises(InputError, match=r'config\.a\.b cannot be written as JSON'):
        workdir.to_json(ConfigDict({'a': {'b': object()}}))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_an_end(number, capfd):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), number)
        assert preemption.requested(2)
        assert signal.Signals(number).name in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


TWO_PROCESSES = """
import os, signal, sys, time
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
rank = int(sys.argv[2])
jax.distributed.initialize(f'127.0.0.1:{sys.argv[1]}', 2, rank)
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from metacanvas_jax.checkpoint import RunCheckpoints
from metacanvas_jax.train.log import MetricLog
from metacanvas_jax.train.preemption import Preemption
from metacanvas_jax.train.workdir import open_workdir

mesh = jax.make_mesh((4,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
place = NamedSharding(mesh, PartitionSpec('a'))
x = jax.jit(lambda: jnp.zeros((8, 8)), out_shardings=place)()
target = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)}
advance = jax.jit(lambda x: (x + 1, x.sum()), donate_argnums=0)
with open_workdir(sys.argv[3], ConfigDict({'a': 1})) as workdir:
    with RunCheckpoints(workdir / 'checkpoints') as checkpoints, Preemption() as preemption:
        found = checkpoints.restore(target)
        start = 0
        if found:
            start, x = found[0], found[1]['x']
        with MetricLog(workdir, every=50, total=1000, resume_step=start) as log:
            for step in range(start + 1, start + 500):
                x, loss = advance(x)
                log.write(step, {'loss': loss})
                loss.block_until_ready()
                time.sleep(0.01)
                if step == start + 10 and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if preemption.requested(step):
                    log.flush()
                    checkpoints.save(step, {'x': x}, {})
                    break
print('start', start, 'stop', step)
jax.distributed.shutdown()
"""


def _two(path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
        'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2',
    }
    runs = [
        subprocess.Popen(
            [sys.executable, '-c', TWO_PROCESSES, str(port), str(rank), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outs = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outs
    last = [out.splitlines()[-1].split() for out, _ in outs]
    assert last[0] == last[1]
    return int(last[0][1]), int(last[0][3])


def test_two_processes_stop_and_resume_together(tmp_path):
    start, stop = _two(tmp_path)
    assert start == 0
    assert 10 <= stop < 499
    assert _two(tmp_path)[0] == stop
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['loss'] for line in lines] == [64.0 * i for i in range(len(lines))]
