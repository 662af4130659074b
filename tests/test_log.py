"""metrics.jsonl of an interrupted run equals that of an uninterrupted one."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.train.log import MetricLog


def _metrics(step):
    return {'loss': jnp.float32(1) / step, 'grad_norm': jnp.bfloat16(step), 'skipped': jnp.int32(0)}


def _log(path, first, last, *, every=4, total=20, **kwargs):
    log = MetricLog(path, every=every, total=total, resume_step=first, **kwargs)
    for step in range(first + 1, last + 1):
        log.write(step, _metrics(step))
    return log


def _lines(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_one_line_per_step(tmp_path):
    _log(tmp_path, 0, 18).close()
    lines = _lines(tmp_path)
    assert [line['step'] for line in lines] == list(range(1, 19))
    assert lines[6] == {'step': 7, 'loss': float(np.float32(1) / 7), 'grad_norm': 7.0, 'skipped': 0}


def test_resumed_equals_uninterrupted(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
    _log(tmp_path / 'a', 0, 20).close()
    log = _log(tmp_path / 'b', 0, 10)
    log.flush()  # a checkpoint of step 10
    for step in range(11, 16):
        log.write(step, _metrics(step))
    log.close()  # killed at 15, with a torn line
    file = tmp_path / 'b/metrics.jsonl'
    file.write_bytes(file.read_bytes()[:-9])
    _log(tmp_path / 'b', 10, 20).close()
    assert file.read_bytes() == (tmp_path / 'a/metrics.jsonl').read_bytes()
    assert sorted(path.name for path in (tmp_path / 'b').iterdir()) == [
        'metrics.jsonl',
        'timing.jsonl',
    ]


def test_a_new_run_starts_an_empty_file(tmp_path):
    _log(tmp_path, 0, 5).close()
    _log(tmp_path, 0, 2).close()
    assert len(_lines(tmp_path)) == 2


@pytest.mark.parametrize('junk', [b'{"step": 3', b'{"step": 3}', b'\xff\xfe\n', b'{}\n', b'[]\n'])
def test_junk_at_the_end_is_cut(tmp_path, junk):
    _log(tmp_path, 0, 2).close()
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(junk)
    _log(tmp_path, 9, 9).close()
    assert len(_lines(tmp_path)) == 2


def test_flush_puts_queued_lines_on_disk(tmp_path):
    log = _log(tmp_path, 0, 6)
    assert len(_lines(tmp_path)) == 4
    log.flush()
    assert len(_lines(tmp_path)) == 6
    log.write(7, _metrics(7))
    log.write(8, _metrics(8))
    assert len(_lines(tmp_path)) == 8
    log.close()


def test_infinities_are_strict_json(tmp_path):
    with MetricLog(tmp_path, every=1, total=2, resume_step=0) as log:
        log.write(1, {'loss': jnp.float32(jnp.nan)})
        log.write(2, {'loss': -jnp.float32(jnp.inf)})
    values = [float(line['loss']) for line in _lines(tmp_path)]
    assert np.isnan(values[0])
    assert values[1] == -np.inf
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


def test_lines_for_people(tmp_path, capsys):
    _log(tmp_path, 0, 20, every=8).close()
    out = capsys.readouterr().out
    assert '\r' not in out
    assert '\x1b' not in out
    pattern = (
        r'step (8|16|20)/20  loss [\d.]+  grad_norm \d+  skipped 0  [\d.e+]+ steps/s  ETA \d+:\d\d'
    )
    assert len(out.splitlines()) == 3
    assert all(re.fullmatch(pattern, line) for line in out.splitlines())


def test_a_line_has_the_latest_of_each_name(tmp_path, capsys):
    """Of several tasks a step has one; a flush in between forgets nothing."""
    with MetricLog(tmp_path, every=4, total=8, resume_step=0) as log:
        for step in range(1, 9):
            log.write(step, {'loss': step, f'loss_{"ab"[step in (2, 7)]}': step})
            log.flush()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith('step 4/8  loss 4  loss_a 4  loss_b 2  ')
    assert last.startswith('step 8/8  loss 8  loss_a 8  loss_b 7  ')
    assert _lines(tmp_path)[6] == {'step': 7, 'loss': 7, 'loss_b': 7}


def test_one_line_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    _log(tmp_path, 0, 8).close()
    out = capsys.readouterr().out
    assert out.count('\r') == 2
    assert out.count('\n') == 1


def test_times_are_kept_apart(tmp_path):
    _log(tmp_path, 0, 8).close()
    lines = [json.loads(line) for line in (tmp_path / 'timing.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [4, 8]
    assert all(line['steps_per_second'] > 0 for line in lines)


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboardX')
    _log(tmp_path, 0, 4, tensorboard=True).close()
    assert list((tmp_path / 'tensorboard').glob('events*'))
