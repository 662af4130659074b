"""Batches addressed by step: the loader's whole state is one integer.

Row r of step s is record s B + r of an endless stream; a process takes its contiguous rows, so any
number of processes, threads or restarts sees the same batches in the same places.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from metacanvas_jax.types import InputError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def task_of_step(shares: Mapping[str, float], seed: int, step: int) -> str:
    """The task that every process trains at a step (Table 16's ratios are of steps).

    A Kronecker sequence instead of independent draws: any stretch of steps holds nearly its share
    of each task, and 10,000 steps hold it within 0.1 %.
    """
    names = [name for name, share in shares.items() if share > 0]
    if not names or min(shares.values()) < 0:
        raise InputError(f'config.data.tasks wants positive shares, got {dict(shares)}')
    offset = np.random.default_rng(seed).random()
    turn = (step * _GOLDEN % 2**64 / 2**64 + offset) % 1  # in integers: exact at any step
    edges = np.cumsum([shares[name] for name in names])
    place = int(np.searchsorted(edges, turn * edges[-1], 'right'))
    return names[min(place, len(names) - 1)]


def process_rows(batch: int, accumulate: int, name: str = 'batch_size') -> range:
    """The rows of a global batch, config.NAME, that belong to this process."""
    parts = jax.device_count() * accumulate
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise InputError(
            f'config.{name} {batch} is not divided by {jax.device_count()} devices x '
            f'{accumulate} accumulated parts; nearest: {nearest}'
        )
    rows = batch // jax.process_count()
    return range(jax.process_index() * rows, (jax.process_index() + 1) * rows)


class Loader:
    """`encode(task, records, lots)` makes a batch; a lot is a uniform number for each record.

    `batch` is the size of each task's batches.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        shares: Mapping[str, float],
        encode: Callable,
        *,
        batch: Mapping[str, int],
        accumulate: int,
        seed: int,
        threads: int,
        prefetch: int,
    ):
        if missing := [name for name in shares if name not in sources]:
            raise InputError(
                f'config.data.tasks names {missing[0]!r}, its source has: {", ".join(sources)}'
            )
        self._rows = {task: process_rows(size, accumulate) for task, size in batch.items()}
        self._sources, self._shares, self._encode = sources, shares, encode
        self._batch, self._seed = batch, seed
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)

    def task(self, step: int) -> str:
        return task_of_step(self._shares, self._seed, step)

    def batch(self, step: int):
        """This process' rows of a step's batch, on the host."""
        task = self.task(step)
        source, rows, size = self._sources[task], self._rows[task], self._batch[task]
        records = [source[(step * size + row) % len(source)] for row in rows]
        lots = np.random.default_rng((self._seed, step)).random(size)[rows]
        return self._encode(task, records, lots)

    def try_tasks(self) -> None:
        """One record of each task becomes a batch, or is refused."""
        for task in self._shares:
            self._encode(task, [self._sources[task][0]], np.ones(1))

    def iterate(self, start: int, stop: int) -> Iterator:
        """Batches of steps [start, stop), prepared by threads ahead of their use."""
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        return iter(steps.to_iter_dataset(self._options))
