"""Inputs of gated linear attention, and its oracle: `loop`, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels import LinearState

HEADS = {  # H, J, G
    "equal": (4, 4, 4),
    "gqa3": (6, 6, 2),
    "gqa4": (4, 4, 1),
    "gqa3_shared_maps": (6, 2, 2),
    "gqa4_shared_maps": (4, 1, 1),
}
LENGTHS = [1, 63, 64, 65, 200]


def inputs(
    length: int, heads: str = "gqa3", dtype: torch.dtype = torch.float64, batch: int = 2, features: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    query_heads, key_heads, value_heads = HEADS[heads]
    q = torch.rand(batch, length, query_heads, features, generator=generator, dtype=torch.float64)
    k = torch.rand(batch, length, key_heads, features, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, length, value_heads, 7, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def segments(length: int) -> Tensor:
    """Row 0: documents of 1, 62, 2 and more tokens (ends at, before and behind chunk ends). Row 1: one document."""
    first = torch.bucketize(torch.arange(length), torch.tensor([1, 63, 65, 128]), right=True)
    return torch.stack([first, torch.zeros_like(first)])


GATES = ["none", "head", "feature"]


def gates(length: int, key_heads: int, kind: str, strength: float = 1.0, features: int = 5, batch: int = 2) -> Any:
    """Log decays in -strength..0, one in four of them 1000 times weaker."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(length + 1)
    shape = (batch, length, key_heads, features)[: 4 if kind == "feature" else 3]
    weak = torch.where(torch.rand(shape, generator=generator) < 0.25, 1e-3, 1.0)
    return -strength * (torch.rand(shape, generator=generator, dtype=torch.float64) * weak)


def some_state(heads: str, dtype: torch.dtype = torch.float64, features: int = 5) -> LinearState:
    generator = torch.Generator().manual_seed(9)
    s = torch.randn(2, HEADS[heads][1], features, 7, generator=generator, dtype=torch.float64)
    z = torch.rand(2, HEADS[heads][1], features, generator=generator, dtype=torch.float64)
    return LinearState(s.to(dtype), z.to(dtype))


def loop(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, state: LinearState | None, segments_BT: Tensor | None
) -> tuple[Tensor, Tensor, LinearState]:
    """The recurrence, token by token, in the inputs' precision."""
    key_heads, queries = k.shape[2], q.shape[2] // k.shape[2]
    v = v.repeat_interleave(key_heads // v.shape[2], 2)
    s, z = state or (k.new_zeros(*k[:, 0].shape, v.shape[-1]), torch.zeros_like(k[:, 0]))
    num, den = [], []
    for t in range(q.shape[1]):
        if segments_BT is not None and t:
            same = (segments_BT[:, t] == segments_BT[:, t - 1])[:, None, None]
            s, z = s * same.unsqueeze(-1), z * same
        if gate is not None:
            keep = gate[:, t].exp().view(*gate[:, t].shape[:2], -1)
            s, z = s * keep.unsqueeze(-1), z * keep
        s, z = s + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2), z + k[:, t]
        q_BJPF = q[:, t].unflatten(1, (key_heads, queries))
        num.append((q_BJPF @ s).flatten(1, 2))
        den.append((q_BJPF @ z.unsqueeze(-1)).flatten(1))
    return torch.stack(num, 1), torch.stack(den, 1), LinearState(s, z)


def flat(result: tuple[Tensor, Tensor, LinearState]) -> list[Tensor]:
    return [*result[:2], *result[2]]
