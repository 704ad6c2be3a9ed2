"""A process that fails tells the others why, wherever they are: they may wait for it in a collective, for hours.

Where processes meet anyway they agree on faults (`Processes.on_main`, `Processes.all_or_none`). Within a collective
nobody can say anything, and an agreement in each step would make the host wait. So a thread looks into the launcher's
store now and then, which costs a step nothing.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

from linearize.errors import LinearizeError, OtherFailed, RunError, RunInterrupted

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

LOOK, GRACE = 0.5, 5.0
"""Seconds between two looks; and until a process ends that has heard of a fault, and not met it by itself."""

EXIT = 2
"""As the command line ends with after any error of a user's."""

_calls = itertools.count()


def failed(rank: int, error: Exception) -> RunError:
    """The error that names a process and what it failed of."""
    if isinstance(error, LinearizeError):
        return RunError(f"process {rank} failed: {error}")
    first = (str(error) or "no more is known").splitlines()[0]
    lower = ", after lowering what needs it" if isinstance(error, OUT_OF_MEMORY) else ""
    remedy = f"What was saved is whole: go on with the same command and `--resume`{lower}."
    return RunError(f"process {rank} failed: {type(error).__name__}: {first}", remedy=remedy)


@contextmanager
def told(rank: int, count: int) -> Iterator[None]:
    """Inside, a fault that ends one process ends the others too, each with a message that names it.

    One that does not leave the block within GRACE seconds is waiting for who will not come: it exits where it is.
    Checkpoints are whole or absent, so what was saved can be gone on with.

    Raises:
        RunError: in place of running out of memory; everything else as it comes.
    """
    if count == 1:
        yield
        return
    board = _Board(count, next(_calls))
    try:
        yield
    except (OtherFailed, RunInterrupted):  # all processes know
        raise
    except Exception as error:
        named = failed(rank, error)
        board.post(str(named))
        if isinstance(error, (LinearizeError, *OUT_OF_MEMORY)):  # anything else may be that the others are gone
            board.wait()
        if isinstance(error, OUT_OF_MEMORY):
            raise named from error
        raise
    finally:
        board.leave()


class _Board:
    """The first fault of a run, on which all processes look.

    Args:
        number: of this run among those of these processes.
    """

    def __init__(self, count: int, number: int) -> None:
        # a client of its own: one that waits keeps other threads from the connection
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()  # torch's own types do not know it
        self._store = dist.PrefixStore(f"linearize/{number}", store)
        self._count, self._left = count, Event()
        self._thread = Thread(target=self._look, name="faults", daemon=True)
        self._thread.start()

    def post(self, words: str) -> None:
        """Tell the others; of several processes that fail, the first one counts."""
        with suppress(dist.DistError):  # of a main process that has ended: nobody can be told then
            self._store.compare_set("fault", "", words)
        self.leave()

    def wait(self) -> None:
        """Until all know: with this process its store may end."""
        with suppress(dist.DistError):
            ends = time.monotonic() + 2 * GRACE
            while self._store.add("know", 0) < self._count and time.monotonic() < ends:
                time.sleep(LOOK / 5)

    def leave(self) -> None:
        """Hear no more."""
        if not self._left.is_set():
            self._left.set()
            self._thread.join()
            with suppress(dist.DistError):
                self._store.add("know", 1)

    def _look(self) -> None:
        with suppress(dist.DistError):
            while not self._left.wait(LOOK):
                if self._store.check(["fault"]) and not self._left.wait(GRACE):
                    words = self._store.get("fault").decode()
                    sys.stderr.write(f"error {words}\n")
                    sys.stderr.flush()
                    self._store.add("know", 1)
                    time.sleep(2 * LOOK)  # a launcher ends all when one has ended: who failed is to say it first
                    os._exit(EXIT)
