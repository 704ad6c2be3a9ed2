"""Objectives as pure functions of tensors.

Shape legend: B batch, T tokens, H query heads, V value width (in distillation: vocabulary), D model width, L = B * T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RowWeights = Callable[[int, int], Tensor]


def output_mse(student_BTHV: Tensor, teacher_BTHV: Tensor) -> Tensor:
    """Mean squared difference of mixed values before the output projection (arXiv 2410.10254, stage 1)."""
    return F.mse_loss(student_BTHV.float(), teacher_BTHV.float())


def relative_error(student_BTHV: Tensor, teacher_BTHV: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 over the whole layer: 0 is perfect, 1 is as bad as answering zero.

    Absolute errors grow with depth because activations do; this one compares layers.
    """
    student, teacher = student_BTHV.float(), teacher_BTHV.float()
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def attention_cross_entropy(teacher: RowWeights, student: RowWeights, length: int, block: int = 128) -> Tensor:
    """Cross-entropy of the student's attention rows under the teacher's, mean over batch, heads and queries, in nats.

    Minimising it minimises KL(teacher || student) (arXiv 2402.04347, "attention weight distillation"). Rows are formed
    `block` at a time and again in the backward pass, so memory is B * H * block * T, never T * T.
    """

    def block_sum(start: int, stop: int) -> Tensor:
        target_BHRT, weight_BHRT = teacher(start, stop), student(start, stop)
        return -(target_BHRT * weight_BHRT.clamp_min(1e-12).log()).sum(-1).mean((0, 1)).sum()

    starts = range(0, length, block)
    parts = [checkpoint(block_sum, start, min(start + block, length), use_reentrant=False) for start in starts]
    return torch.stack(parts).sum() / length


class DistillationLoss(NamedTuple):
    """Means over target tokens, in nats."""

    loss: Tensor  # kl_weight * kl + ce_weight * cross_entropy; carries the gradient
    kl: Tensor  # KL(teacher || student) at the given temperature, times temperature^2
    cross_entropy: Tensor  # of the next token, at temperature 1


def distillation_loss(
    student_LD: Tensor,
    teacher_LD: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_L: Tensor,
    mask_L: Tensor,
    weights: "DistillationWeights",
) -> DistillationLoss:
    """KL to the teacher plus next-token cross-entropy, in chunks: no [L, vocabulary] tensor ever exists.

    Args:
        student_LD: final hidden states of the student; the gradient flows into them.
        teacher_LD: final hidden states of the teacher.
        head: frozen map from hidden states to logits, shared by both.
        targets_L: next tokens.
        mask_L: True where there is a target.
        weights: of the two terms, and the temperature.

    The KL term is multiplied by temperature^2, which keeps its gradient comparable over temperatures (arXiv
    1503.02531). Both terms are means over the targets: dividing by the batch size only, as `batchmean` over
    [B, T, V] does, makes them grow with T.
    """
    loss, kl, cross_entropy = _Distillation.apply(student_LD, teacher_LD, head, targets_L, mask_L, weights)
    return DistillationLoss(loss, kl, cross_entropy)


class DistillationWeights(NamedTuple):
    kl: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    chunk: int = 1024  # tokens whose logits exist at one time


class _Distillation(torch.autograd.Function):
    """Computes each chunk's gradient right after its loss, and keeps only the gradient of the hidden states."""

    @staticmethod
    def forward(ctx: Any, student_LD: Tensor, teacher_LD: Tensor, head: Any, targets_L: Tensor, mask_L: Tensor,
                weights: DistillationWeights) -> tuple[Tensor, Tensor, Tensor]:
        count = mask_L.sum().clamp_min(1)
        gradient_LD = torch.empty_like(student_LD)
        sums = torch.zeros(3, device=student_LD.device)
        for start in range(0, len(targets_L), weights.chunk):
            part = slice(start, start + weights.chunk)
            with torch.enable_grad():
                hidden = student_LD[part].detach().requires_grad_()
                terms = _chunk_terms(head(hidden), head(teacher_LD[part].detach()), targets_L[part], mask_L[part],
                                     weights)
                (gradient_LD[part],) = torch.autograd.grad(terms[0], hidden)
            sums += torch.stack([term.detach() for term in terms])
        ctx.save_for_backward(gradient_LD / count)
        loss, kl, cross_entropy = (sums / count).unbind()
        ctx.mark_non_differentiable(kl, cross_entropy)
        return loss, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_LD,) = ctx.saved_tensors
        return gradient_LD * gradients[0], None, None, None, None, None


def _chunk_terms(
    student_LV: Tensor, teacher_LV: Tensor, targets_L: Tensor, mask_L: Tensor, weights: DistillationWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the chunk's target tokens: weighted loss, KL, cross-entropy."""
    temperature = weights.temperature
    student_LV, teacher_LV = student_LV.float(), teacher_LV.detach().float()
    student_log = (student_LV / temperature).log_softmax(-1)
    teacher_log = (teacher_LV / temperature).log_softmax(-1)
    kl_L = (teacher_log.exp() * (teacher_log - student_log)).sum(-1) * temperature**2
    kl = (kl_L * mask_L).sum()
    plain_log = student_log if temperature == 1 else student_LV.log_softmax(-1)
    cross_entropy = -(plain_log.gather(-1, targets_L[:, None])[:, 0] * mask_L).sum()
    return weights.kl * kl + weights.cross_entropy * cross_entropy, kl, cross_entropy
