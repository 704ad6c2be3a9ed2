"""The Triton window (window_attention, windowed_linear_attention) against its loops and torch forms in fp64.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import (
    Branch,
    Far,
    LinearState,
    Near,
    Sinks,
    configs,
    window_attention,
    windowed_linear_attention,
)
from linearize_kernels.gated_linear_attention import launch
from linearize_kernels.hedgehog_attention import Map, hedgehog_features
from linearize_kernels.windowed_linear_attention.naive import naive_window_sums
from tests.test_kernels_triton import DEVICE, KERNELS, both, check, eager_features, naive, segments

WINDOW_KERNELS = ("window_forward", "window_query_gradients", "window_key_gradients")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks and splits so short that short sequences have several; outputs that are NaN until they are written."""
    monkeypatch.setattr(launch, "SPLIT_UNIT", 64)
    monkeypatch.setattr(launch, "MIN_SPLIT", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    configs.overrides.update({name: configs.Launch(32, 4, 1) for name in (*KERNELS, *WINDOW_KERNELS)})
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def places(kind: str, length: int) -> Tensor | None:
    """Positions of two rows."""
    token_T = torch.arange(length)
    first = {
        "whole": token_T,
        "padded": (token_T - 7).clamp_min(-1),
        "packed": torch.cat([torch.arange(5), token_T])[:length],
        "continued": token_T + 50,
    }
    return None if kind == "none" else torch.stack([first[kind], token_T]).to(DEVICE)


def window(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and denominators; naive and eager by the loop, all of it in the dtype where eager."""
    q, k, v = (leaves[name] for name in "qkv")
    sinks = Sinks(leaves["sink_k"], leaves["sink_v"]) if "sink_k" in leaves else None
    position_BT, size, meta = fixed["position"], fixed["window"], leaves.get("meta")
    if how == "triton":
        o, den = window_attention(q, k, v, size, position_BT, sinks, meta)
        return [o, den]
    cast = torch.float64 if how == "exact" else dtype
    if position_BT is None:
        position_BT = torch.arange(q.shape[1]).expand(q.shape[0], -1)
    sinks = None if sinks is None else Sinks(*(x.to(cast) for x in sinks))
    num, den, top = naive_window_sums(q.to(cast), k.to(cast), v.to(cast), position_BT, size, sinks)
    if meta is not None:
        new = torch.maximum(top, meta.detach().amax(-1).to(cast))
        num, den = num * (top - new).exp().unsqueeze(-1), den * (top - new).exp()
        den = den + (meta.to(cast) - new.unsqueeze(-1)).exp().sum(-1)
    return [num / den.masked_fill(den == 0, 1).unsqueeze(-1), den]


CASES = [  # T, H, G, K, V, window, rows before the first token, sinks, metas, places
    (1, 2, 1, 16, 16, 3, 2, 2, 0, "continued"),
    (40, 2, 2, 16, 16, 1, 0, 0, 0, "none"),
    (70, 4, 2, 20, 24, 33, 0, 0, 3, "none"),
    (70, 3, 1, 20, 24, 40, 40, 2, 0, "continued"),
    (67, 2, 1, 16, 16, 9, 0, 2, 2, "packed"),
    (67, 2, 1, 16, 24, 9, 9, 3, 2, "padded"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    length, heads, groups, width, values, size, past, sinks, metas, kind = case
    torch.manual_seed(length + heads)
    tensors = {
        "q": torch.randn(2, length, heads, width) * width**-0.5,
        "k": torch.randn(2, past + length, groups, width),
        "v": torch.randn(2, past + length, groups, values),
    }
    if sinks:
        rows = length if kind == "packed" else 1
        for name, last in (("sink_k", width), ("sink_v", values)):
            tensors[name] = torch.randn(2, rows, sinks, groups, last).to(dtype).float()
    if metas:
        tensors["meta"] = torch.randn(heads, metas)
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    check(both(window, tensors, {"position": places(kind, length), "window": size}, dtype), dtype)


def windowed(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    state = LinearState(leaves["s"], leaves["z"]) if "s" in leaves else None
    q, k, v, gate = (leaves[name] for name in ("q", "k", "v", "gate"))
    weights, maps = tuple(leaves["weights"]), (Map(leaves["q_weight"]), Map(leaves["k_weight"]))
    segments_BT, separate = fixed["segments"], fixed["separate"]
    if how == "triton":
        near = Near(q * 0.25, k, v, Sinks(leaves["sink_k"], leaves["sink_v"]), leaves["meta"])
        far = Far(q, k, v, *maps, "softmax", gate, state, fixed["mask"])
        rest = (fixed["window"], fixed["position"], segments_BT, weights)
        y, end = windowed_linear_attention(near, far, *rest, separate=separate)
        return [y, *end]
    o, den = window({**leaves, "q": q * 0.25}, fixed, how, dtype)
    features = eager_features if how == "eager" else hedgehog_features
    length, size = q.shape[1], fixed["window"]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, size, 0))[:, :length] for x in (k, v))
    comes_BT = fixed["mask"] if fixed["mask"] is not None else torch.arange(length, device=q.device)[None] >= size + 2
    q, k = (features(x, *one, "softmax", side) for x, one, side in ((q, maps[0], "query"), (k, maps[1], "key")))
    k = k * comes_BT[:, :, None, None]
    other = None if separate else Branch(o, den * (weights[0] / weights[1]).to(den.dtype))
    y, *end = naive(q, k, v, gate, state, segments_BT, dtype, how, other)
    if separate:
        near_H1, far_H1 = (weight.to(y.dtype).unsqueeze(-1) for weight in weights)
        y = near_H1 * o + far_H1 * y
    return [y, *end]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windowed_linear_attention(dtype: torch.dtype, packed: bool, separate: bool) -> None:
    """Keys that leave the window after 9 tokens, two sinks, three splits."""
    length, heads, groups, width, sinks = 150, 4, 2, 16, 2
    torch.manual_seed(3)
    rows = length if packed else 1
    tensors = {
        "q": torch.randn(2, length, heads, width),
        "k": torch.randn(2, length, groups, width),
        "v": torch.randn(2, length, groups, width),
        "q_weight": torch.randn(heads, width, width) * width**-0.5,
        "k_weight": torch.randn(heads, width, width) * width**-0.5,
        "gate": -torch.rand(2, length, heads) * 0.3,
        "sink_k": torch.randn(2, rows, sinks, groups, width).to(dtype).float(),
        "sink_v": torch.randn(2, rows, sinks, groups, width).to(dtype).float(),
        "meta": torch.randn(heads, 2),
        "weights": torch.rand(2, heads) + 0.1,  # one tensor: errors of few sums over all tokens are a matter of luck
    }
    if not packed:
        tensors |= {"s": torch.rand(2, heads, 2 * width, width), "z": torch.rand(2, heads, 2 * width)}
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    fixed: dict[str, Any] = {"segments": None, "position": None, "mask": None, "separate": separate, "window": 9}
    if packed:
        segments_BT = segments(length)
        place_T = torch.arange(length, device=DEVICE)
        starts = torch.nn.functional.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))
        position_BT = place_T - torch.where(starts, place_T, 0).cummax(1).values
        fixed |= {"segments": segments_BT, "position": position_BT, "mask": position_BT >= 9 + sinks}
    check(both(windowed, tensors, fixed, dtype), dtype)
