"""SIGINT and SIGTERM ask a run to stop; it does so at the next safe place."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from linearize.distributed import Processes

TWICE = 5.0
"""Seconds in which a launcher may hand on a signal that the terminal has sent to all already."""


class Interrupt:
    """The signals that asked to stop."""

    def __init__(self, processes: Processes) -> None:
        self.signals: list[signal.Signals] = []
        self._processes, self._first = processes, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        handed_on = self._processes.count > 1 and time.monotonic() - self._first < TWICE
        if self.signals and handed_on:
            return
        self._first = time.monotonic()
        self.signals.append(signal.Signals(number))
        if len(self.signals) > 1:
            raise KeyboardInterrupt
        if not self._processes.main:
            return
        # written directly: a handler that runs within a print must not print
        os.write(2, b"\nstopping after this step and a checkpoint; once more to stop at once\n")


@contextmanager
def interruptible(processes: Processes) -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of dying by them; a second one raises KeyboardInterrupt at once.

    Python allows this in the main thread only; elsewhere the handlers stay as they are.
    """
    interrupt = Interrupt(processes)
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
