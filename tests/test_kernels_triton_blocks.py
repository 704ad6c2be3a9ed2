"""Hedgehog attention where the running states go through memory: against the definition in fp64, and the walk.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from linearize_kernels import configs, hedgehog_attention
from linearize_kernels.gated_linear_attention import launch, launch_blocks
from linearize_kernels.hedgehog_attention import Map
from tests.test_kernels_triton import DEVICE, check, hedgehog, made

KERNELS = ("block_outputs", "block_states")
FORMS: dict[str, Sequence[configs.Launch]] = {  # how KERNELS are launched
    "small": (configs.Launch(64, 4, 1), configs.Launch(32, 4, 1)),
    "a chunk is a block": (configs.Launch(32, 4, 1), configs.Launch(32, 4, 1)),
    "as shipped": [configs.default(name, torch.bfloat16, 128, "softmax none") for name in KERNELS],
}


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks and several splits for small heads and short sequences, too; memory that is NaN until it is written."""
    monkeypatch.setattr(launch, "ONE_SIGN_FROM", 32)
    monkeypatch.setattr(launch_blocks, "BLOCKS_FROM", 1)
    monkeypatch.setattr(launch_blocks, "MIN_SPLIT", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of sequences that went by blocks."""
    lengths: list[int] = []
    walk_blocks = launch.walk_blocks

    def counted(blocks: Any, *arguments: Any) -> Any:
        lengths.append(blocks.plan.length)
        return walk_blocks(blocks, *arguments)

    monkeypatch.setattr(launch, "walk_blocks", counted)
    return lengths


def use(form: str) -> None:
    configs.overrides.update(dict(zip(KERNELS, FORMS[form], strict=True)))


@torch.no_grad()
def compare(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Outputs and end state: the definition in fp64, in the dtype, and the kernels."""
    tensors, fixed = made(case, "softmax")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for how in ("exact", "eager", "triton"):
            patch.setenv("LINEARIZE_BACKEND", "triton" if how == "triton" else "torch")
            rounded = {
                name: x.to(dtype if name in ("q", "k", "v", "o") else torch.float32) for name, x in tensors.items()
            }
            leaves = {name: x.double() if how == "exact" else x for name, x in rounded.items()}
            found.append([x.double() for x in hedgehog(leaves, fixed, how, dtype)])
    check(found, dtype)


CASES = [  # T, H, G, K, F, V, bias, gate, other, packed, masked, state
    (2, 2, 1, 16, 32, 32, False, False, False, False, False, True),
    (100, 2, 1, 16, 32, 32, False, False, False, False, False, True),
    (200, 2, 2, 20, 24, 28, True, True, True, True, False, False),
    (200, 2, 1, 16, 32, 32, False, True, False, False, False, True),
    (131, 2, 2, 16, 32, 32, False, False, False, True, True, True),
    (330, 1, 1, 20, 24, 28, True, False, True, False, True, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(case: tuple[Any, ...], dtype: torch.dtype, calls: list[int]) -> None:
    use("small")
    compare(case, dtype)
    assert calls == [case[0]]


def test_a_chunk_is_a_block(calls: list[int]) -> None:
    use("a chunk is a block")
    compare(CASES[2], torch.bfloat16)
    assert calls == [CASES[2][0]]


WIDE = [
    (100, 2, 1, 128, 128, 128, False, False, False, False, False, False),
    (300, 2, 1, 128, 128, 128, False, False, False, False, False, True),
    (515, 2, 2, 128, 128, 128, True, True, True, True, True, True),
    (257, 1, 1, 96, 100, 80, False, True, False, False, True, True),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_heads_of_128(case: tuple[Any, ...], calls: list[int]) -> None:
    use("as shipped")
    compare(case, torch.bfloat16)
    assert calls == [case[0]]


@torch.no_grad()
@pytest.mark.parametrize("normalised", [True, False])
def test_as_the_walk(normalised: bool, calls: list[int]) -> None:
    """Keys that come late, and sums that are not divided: what `walk` with all that its backward pass needs returns."""
    use("small")
    tensors, _ = made((150, 2, 1, 16, 32, 32, True, True, normalised, False, False, True), "softmax")
    names = ("q", "k", "v", "gate", "", "", "q_weight", "k_weight", "q_bias", "k_bias", "o", "d", "s", "z")
    given = [tensors.get(name) for name in names]
    rest = ("softmax", normalised, 1e-6, 40, 3, True)
    found = launch._walk_alone(*given, *rest)[:4]  # y, scale, end state
    assert calls == [150]
    for ours, walked in zip(found, launch._walk(True, *given, *rest)[:4], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, walked, rtol=1e-5, atol=1e-5)


def plan_of(length: int, width: int, dtype: torch.dtype = torch.bfloat16) -> launch.Plan:
    x, weight = torch.empty(1, length, 1, width, dtype=dtype), torch.empty(1, width, width)
    return launch.Plan(x, x, x, None, None, None, weight, None, "softmax", True, 0, 0)


def test_where_blocks_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences of heads of 128 in bf16: what was measured."""
    monkeypatch.undo()
    assert plan_of(2048, 128).blocks is not None
    others = (plan_of(2047, 128), plan_of(4096, 64), plan_of(4096, 256), plan_of(4096, 128, torch.float32))
    assert [plan.blocks for plan in others] == [None] * 4


def test_training_keeps_the_walk(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    use("small")
    x = torch.randn(1, 70, 1, 32, device=DEVICE, requires_grad=True)
    maps = [Map(torch.randn(1, 32, 32, device=DEVICE)) for _ in range(2)]
    hedgehog_attention(x, x, x, *maps)[0].sum().backward()
    assert x.grad is not None
    assert not calls
