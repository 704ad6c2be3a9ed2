"""The distillation loss in Triton and in torch against its definition in fp64.

On a machine without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import LossWeights, configs, distillation_terms
from linearize_kernels.distillation_loss.naive import naive_distillation_terms
from tests.test_kernels_triton import DEVICE, check

WEIGHTS = [LossWeights(), LossWeights(0.0, 1.0), LossWeights(0.7, 0.2, 2.0), LossWeights(1.0, 0.0, 0.5)]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Several tiles a row; and outputs that are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    configs.overrides["distillation_rows"] = configs.Launch(32, 4, 1)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def make(length: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a student near its teacher, and targets; the first token and some others have none."""
    torch.manual_seed(0)
    teacher_LV = scale * torch.randn(length, vocabulary, device=DEVICE)
    student_LV = teacher_LV + 0.3 * scale * torch.randn_like(teacher_LV)
    targets_L = torch.randint(vocabulary, (length,), device=DEVICE)
    mask_L = torch.rand(length, device=DEVICE) < 0.8
    mask_L[0], mask_L[-1] = False, True
    return student_LV.to(dtype), teacher_LV.to(dtype), targets_L, mask_L


def terms(how: str, logits: tuple[Tensor, ...], weights: LossWeights, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    student_LV, teacher_LV, targets_L, mask_L = logits
    if how == "exact":
        found = naive_distillation_terms(student_LV.double(), teacher_LV.double(), targets_L, mask_L, *weights)
    elif how == "eager":
        found = naive_distillation_terms(student_LV, teacher_LV, targets_L, mask_L, *weights)
    else:
        monkeypatch.setenv("LINEARIZE_BACKEND", how)
        found = distillation_terms(student_LV, teacher_LV, targets_L, mask_L, weights)
    return [x.double() for x in found]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 64, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms(weights: LossWeights, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make(9, vocabulary, dtype)
    for ours in ("torch", "triton"):
        check([terms(how, logits, weights, monkeypatch) for how in ("exact", "eager", ours)], dtype)


def test_logits_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums relative to the largest logit: nothing overflows, and a student that is its teacher has nothing to learn."""
    student_LV, teacher_LV, *rest = make(5, 97, torch.float32, scale=300.0)
    for shift in (-4000.0, 4000.0):
        logits = (student_LV + shift, teacher_LV + shift, *rest)
        check([terms(how, logits, WEIGHTS[2], monkeypatch) for how in ("exact", "eager", "triton")], torch.float32)
    gradient, kl, _ = terms("triton", (teacher_LV, teacher_LV, *rest), WEIGHTS[0], monkeypatch)
    assert not gradient.any()
    assert kl.abs() < 1e-4


def test_tokens_without_a_target_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    student_LV, teacher_LV, targets_L, mask_L = make(9, 97, torch.float32)
    clean = terms("triton", (student_LV, teacher_LV, targets_L, mask_L), WEIGHTS[2], monkeypatch)
    student_LV[~mask_L], teacher_LV[~mask_L] = float("nan"), float("nan")
    poisoned = terms("triton", (student_LV, teacher_LV, targets_L, mask_L), WEIGHTS[2], monkeypatch)
    for left, right in zip(clean, poisoned, strict=True):
        assert torch.equal(left, right)
    assert not poisoned[0][~mask_L].any()


def test_rows_may_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    student_LV, teacher_LV, *rest = make(9, 97, torch.float32)
    apart = [torch.cat([x, x], dim=1)[:, :97] for x in (student_LV, teacher_LV)]
    assert not apart[0].is_contiguous()
    found = [terms("triton", (*x, *rest), WEIGHTS[2], monkeypatch) for x in (apart, (student_LV, teacher_LV))]
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_fake_kernels_tell_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    logits = make(5, 97, torch.bfloat16)
    compiled = torch.compile(distillation_terms, backend="aot_eager", fullgraph=True)
    for left, right in zip(compiled(*logits, WEIGHTS[2]), distillation_terms(*logits, WEIGHTS[2]), strict=True):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
