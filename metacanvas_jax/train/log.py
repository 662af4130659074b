"""Metrics of a run: one line of JSON per step, one line for people every N steps.

`metrics.jsonl` holds deterministic values only and is cut at the step from which a run resumes, so
the file of an interrupted run equals the file of an uninterrupted one. Times go to `timing.jsonl`.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np


class MetricLog:
    """Takes device scalars at every step and fetches them every `every` steps."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        every: int,
        total: int,
        resume_step: int,
        tensorboard: bool = False,
    ) -> None:
        self._every, self._total = every, total
        self._queue: list[tuple[int, Mapping[str, Any]]] = []
        self._latest: dict[str, int | float] = {}  # of each name, for not every step has all
        self._clock, self._clock_step, self._last = time.monotonic(), resume_step, resume_step
        self._tty, self._open_line = sys.stdout.isatty(), False
        self._writes = jax.process_index() == 0
        self._board: Any = None
        if not self._writes:
            return
        workdir = pathlib.Path(workdir)
        self._metrics = _reopen(workdir / 'metrics.jsonl', resume_step)
        self._timing = _reopen(workdir / 'timing.jsonl', resume_step)
        if tensorboard:
            self._board = _board(workdir / 'tensorboard', resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of `step`; the values may still be on their way."""
        if not self._writes:
            return
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._queue.append((step, dict(metrics)))
        if step % self._every == 0 or step == self._total:
            self._drain()
            self._report(step)

    def flush(self) -> None:
        """Puts every line on the disk; call it before each save of a checkpoint."""
        if not self._writes:
            return
        self._drain()
        for file in (self._metrics, self._timing):
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if not self._writes:
            return
        self.flush()
        self._end_line()
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()
        self._writes = False

    def __enter__(self) -> 'MetricLog':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drain(self) -> None:
        """Writes the queued lines."""
        queue, self._queue = self._queue, []
        for step, metrics in queue:
            assert step > self._last, f'step {step} written after step {self._last}'
            self._last = step
            values = {name: _number(value) for name, value in metrics.items()}
            self._latest |= values
            line = {name: _strict(value) for name, value in values.items()}
            self._metrics.write(json.dumps({'step': step, **line}) + '\n')
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        self._metrics.flush()

    def _report(self, step: int) -> None:
        now = time.monotonic()
        rate = (step - self._clock_step) / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, step
        timing = {'step': step, 'time': round(time.time(), 3), 'steps_per_second': round(rate, 4)}
        self._timing.write(json.dumps(timing) + '\n')
        self._timing.flush()
        shown = [f'{name} {value:.4g}' for name, value in self._latest.items()]
        pace = f'{rate:.3g} steps/s' if rate < 100 else f'{rate:.0f} steps/s'
        left = _clock((self._total - step) / rate)
        line = '  '.join([f'step {step}/{self._total}', *shown, pace, f'ETA {left}'])
        if self._tty:
            sys.stdout.write(f'\r\x1b[K{line}')
            self._open_line = True
        else:
            sys.stdout.write(f'{line}\n')
        sys.stdout.flush()

    def _end_line(self) -> None:
        if self._open_line:
            sys.stdout.write('\n')
            sys.stdout.flush()
            self._open_line = False


def _reopen(path: pathlib.Path, step: int) -> IO[str]:
    """Opens `path` for appending, without lines after `step` and without a torn last line."""
    kept = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b'\n') or not (0 < _step(line) <= step):
                break
            kept.append(line)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(b''.join(kept))
    os.replace(temporary, path)
    return path.open('a', encoding='utf-8')


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
        return -1


def _board(path: pathlib.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print('no TensorBoard curves: tensorboardX is not installed', file=sys.stderr)
        return None
    return SummaryWriter(logdir=str(path), purge_step=step + 1)


def _number(value: Any) -> int | float:
    array = np.asarray(value)
    assert array.shape == (), f'a metric is one number, got shape {array.shape}'
    return int(array) if array.dtype.kind in 'iub' else float(array)


def _strict(value: int | float) -> int | float | str:
    """JSON has no infinities and no NaN; float() reads these strings back."""
    return value if math.isfinite(value) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
