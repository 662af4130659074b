"""SIGTERM and the first Ctrl-C ask for a checkpoint and an orderly end; the second ends at once."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Asks once per step whether the run shall stop; the same answer on all processes.

    Make it after `jax.distributed.initialize` and in the main thread.
    """

    def __init__(self) -> None:
        self._flag = False
        self._many = jax.process_count() > 1
        # With several processes SIGTERM belongs to the coordination service: a Python handler would
        # replace its own, and the other processes would never hear of it.
        signals = [signal.SIGINT] if self._many else [signal.SIGINT, signal.SIGTERM]
        self._old: dict[int, Any] = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            signal.signal(number, self._handle)

    def requested(self, step: int) -> bool:
        """True from the step on at which all processes shall save and stop."""
        if self._many:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._flag

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __enter__(self) -> 'Preemption':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._flag = True
        # print() is not safe here: the signal may have arrived in the middle of another print.
        os.write(2, f'\n{signal.Signals(number).name}: saving, then stopping\n'.encode())
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
