"""SIGINT and SIGTERM ask a run to stop; it does so at the next safe place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """The signals that asked to stop."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))
        if len(self.signals) > 1:
            raise KeyboardInterrupt
        # written directly: a handler that runs within a print must not print
        os.write(2, b"\nstopping after this step and a checkpoint; once more to stop at once\n")


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of dying by them; a second one raises KeyboardInterrupt at once.

    Python allows this in the main thread only; elsewhere the handlers stay as they are.
    """
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
