"""One of several processes without the others: what it does of their work can be traced, and nothing is exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend


@contextmanager
def pretended(rank: int, count: int) -> Iterator[None]:
    """Inside, this process counts as that one of `count`; what it receives is not filled in."""
    assert not dist.is_initialized(), "a real process has the others"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
