"""Distillation from top-k targets against its definition, and against the loss over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linearize.losses import DistillationWeights, Heads, distillation_loss
from linearize.topk import TopK, top_k, topk_distillation_loss

L, D, V = 30, 12, 40


def case(dtype: torch.dtype = torch.float64, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    student_LD, teacher_LD = (torch.randn(L, D, generator=generator).to(dtype) * scale for _ in range(2))
    student, teacher = (nn.Linear(D, V, bias=False, dtype=dtype) for _ in range(2))
    for head in (student, teacher):
        head.weight.data.copy_(torch.randn(V, D, generator=generator))
    targets_L = torch.randint(V, (L,), generator=generator)
    return student_LD.requires_grad_(), teacher_LD, Heads(student, teacher, (student.weight,)), targets_L


def mask() -> torch.Tensor:
    return torch.arange(L) % 4 != 1


def by_definition(student_LD, teacher_LD, heads, targets_L, k: int, weights: DistillationWeights):
    """Merge all other tokens into one, then take the KL of distributions over k + 1 outcomes."""
    heat = weights.temperature
    p_LV, q_LV = ((x / heat).softmax(-1) for x in (heads.teacher(teacher_LD), heads.student(student_LD)))
    kept = p_LV.topk(k).indices

    def merged(x_LV):
        part = x_LV.gather(-1, kept)
        others = torch.ones_like(x_LV).scatter(-1, kept, 0)
        return torch.cat([part, (x_LV * others).sum(-1, keepdim=True)], -1) if k < V else part

    p, q = merged(p_LV), merged(q_LV)
    kl = (p * (p.log() - q.log())).sum(-1)[mask()].mean() * heat**2
    cross_entropy = F.cross_entropy(heads.student(student_LD)[mask()], targets_L[mask()])
    return weights.kl * kl + weights.cross_entropy * cross_entropy, kl, cross_entropy


@pytest.mark.parametrize("k", [1, 7, V - 1, V])
@pytest.mark.parametrize("heat, ce", [(1.0, 0.0), (2.5, 0.3)])
def test_loss_and_gradients_are_those_of_the_definition(k, heat, ce):
    student_LD, teacher_LD, heads, targets_L = case()
    weights = DistillationWeights(0.7, ce, heat, chunk=8)
    goal = top_k(teacher_LD[None], heads.teacher, k, heat).flat()
    found = topk_distillation_loss(student_LD, goal, heads, targets_L, mask(), weights)
    gradients = torch.autograd.grad(found.loss, [student_LD, *heads.trained])
    expected = by_definition(student_LD, teacher_LD, heads, targets_L, k, weights)
    expected_gradients = torch.autograd.grad(expected[0], [student_LD, *heads.trained])
    for one, two in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), rtol=1e-6, atol=1e-7)  # lse is kept in fp32


@pytest.mark.parametrize("scale", [1.0, 8.0])  # 8: nearly all weight on one token
def test_the_whole_vocabulary_gives_the_uncached_loss(scale):
    student_LD, teacher_LD, heads, targets_L = case(torch.float32, scale)
    weights = DistillationWeights(1.0, 0.2, 1.5)
    goal = top_k(teacher_LD[None], heads.teacher, V, 1.5).flat()
    found = topk_distillation_loss(student_LD, goal, heads, targets_L, mask(), weights)
    whole = distillation_loss(student_LD, teacher_LD, heads, targets_L, mask(), weights)
    for one, two in zip(found, whole, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(
        *(torch.autograd.grad(x.loss, [student_LD, *heads.trained]) for x in (found, whole)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_it_never_exceeds_the_whole_kl_and_grows_with_k():
    student_LD, teacher_LD, heads, targets_L = case()
    weights = DistillationWeights()
    kls = [
        topk_distillation_loss(
            student_LD, top_k(teacher_LD[None], heads.teacher, k).flat(), heads, targets_L, mask(), weights
        ).kl.item()
        for k in (1, 4, 16, V)
    ]
    assert kls == sorted(kls)
    whole = distillation_loss(student_LD, teacher_LD, heads, targets_L, mask(), weights).kl.item()
    assert kls[-1] == pytest.approx(whole, rel=1e-6)


def test_teachers_that_are_certain_leave_finite_losses():
    """All of the teacher's weight is among the kept tokens to rounding, and the student puts none on the others."""
    student_LD, teacher_LD, heads, targets_L = case(torch.float32, 60.0)
    goal = top_k(teacher_LD[None], heads.teacher, 5).flat()
    found = topk_distillation_loss(student_LD, goal, heads, targets_L, mask(), DistillationWeights())
    (gradient,) = torch.autograd.grad(found.loss, [student_LD])
    assert torch.isfinite(found.loss)
    assert torch.isfinite(gradient).all()


def test_targets_know_their_dtypes_and_shapes():
    hidden_BTD = torch.randn(2, 5, D, dtype=torch.bfloat16)
    head = nn.Linear(D, V, dtype=torch.bfloat16)
    found = top_k(hidden_BTD, head, 3, chunk=4)
    assert [tuple(tensor.shape) for tensor in found] == [(2, 5, 3), (2, 5, 3), (2, 5)]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.uint16, torch.float32]
    wide = top_k(torch.randn(1, 2, 2), nn.Linear(2, 2**16 + 1), 3)
    assert wide.indices.dtype == torch.int32
    assert isinstance(found.flat(), TopK)
