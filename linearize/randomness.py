"""Random states of python, numpy and torch: seeded for a part of a run, read and put back."""

from __future__ import annotations

import logging
import random
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


class RngState(TypedDict):
    """The random states of this process, as plain tensors and numbers so that weights_only=True loads them."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: list[Tensor]


def seed_all(seed: int, stage_index: int, micro_batch: int | None = None) -> None:
    """Seed python, numpy and torch (all devices) for one stage of a run, or for one of its micro-batches."""
    words = [seed, stage_index] if micro_batch is None else [seed, stage_index, micro_batch]
    word = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)


def get_rng_state() -> RngState:
    """The states of python, numpy, torch on the CPU and torch on every CUDA device (none if CUDA is not in use)."""
    legacy: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": torch.from_numpy(legacy["state"]["key"].copy())}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: RngState) -> None:
    """Put back what `get_rng_state` returned. Warns where this machine has another number of CUDA devices."""
    version_, keys, gauss_next = state["python"]
    random.setstate((version_, tuple(keys), gauss_next))
    legacy = state["numpy"]
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].numpy()}})
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if state["cuda"] else 0
    if len(state["cuda"]) != devices:
        log.warning("random states of %d CUDA devices were saved, %d are here", len(state["cuda"]), devices)
    for index, cuda_state in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(cuda_state, index)
