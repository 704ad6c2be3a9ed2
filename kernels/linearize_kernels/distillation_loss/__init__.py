"""Kullback-Leibler divergence and next-token cross-entropy over a vocabulary, with the gradient they give the logits.

Shape legend: L tokens, V vocabulary. In Triton: C columns of a tile.

With p, q the softmax of teacher and student logits t, s at temperature c:
c^2 KL(p || q) = c p.(t - s) + c^2 (lse s/c - lse t/c), whose gradient is c (q - p); that of the cross-entropy is
softmax(s) minus one at the target. Written out because the vocabulary is the widest tensor of all: every pass over it
counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.distillation_loss.whole import whole_distillation_terms

__all__ = ["LossWeights", "Terms", "distillation_terms"]


class LossWeights(NamedTuple):
    """Of KL(teacher || student) at a temperature, and of the cross-entropy at temperature 1."""

    kl: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0


class Terms(NamedTuple):
    """Both terms in nats, unweighted and summed over the tokens; and what the weighted sum gives the logits."""

    gradient_LV: Tensor
    kl: Tensor  # times temperature^2
    cross_entropy: Tensor


def distillation_terms(
    student_LV: Tensor, teacher_LV: Tensor, targets_L: Tensor, mask_L: Tensor, weights: LossWeights
) -> Terms:
    """Losses of a chunk of tokens and their gradient; nothing here is differentiated again.

    Args:
        student_LV, teacher_LV: logits.
        targets_L: next tokens.
        mask_L: True where there is a target; other tokens add nothing.

    Returns:
        the gradient in the student's dtype where Triton runs, else in fp32 or wider; sums in fp32 or wider.
    """
    if student_LV.dtype == teacher_LV.dtype and uses_triton("distillation_loss", student_LV):
        from linearize_kernels.distillation_loss.launch import distillation_rows

        student_LV, teacher_LV = (x if x.stride(-1) == 1 else x.contiguous() for x in (student_LV, teacher_LV))
        gradient_LV, kl_L, cross_entropy_L = distillation_rows(
            student_LV, teacher_LV, targets_L.contiguous(), mask_L.contiguous(), *map(float, weights)
        )
        return Terms(gradient_LV, *torch.stack([kl_L, cross_entropy_L]).sum(-1).unbind())
    return Terms(*whole_distillation_terms(student_LV, teacher_LV, targets_L, mask_L, *weights))
