"""The distillation loss in torch, on whole rows of the vocabulary. Legend and formulas in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_distillation_terms(
    student_LV: Tensor, teacher_LV: Tensor, targets_L: Tensor, mask_L: Tensor, kl: float, cross_entropy: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of the weighted sum, the sum of KL times temperature^2, and that of the cross-entropy."""
    dtype = torch.promote_types(student_LV.dtype, torch.float32)
    student_LV, teacher_LV, mask_L1 = student_LV.to(dtype), teacher_LV.to(dtype), mask_L[:, None].to(dtype)
    warm_LV, goal_LV = (
        (student_LV, teacher_LV) if temperature == 1 else (student_LV / temperature, teacher_LV / temperature)
    )
    warm_lse_L1, goal_lse_L1 = warm_LV.logsumexp(-1, keepdim=True), goal_LV.logsumexp(-1, keepdim=True)
    goal_p_LV = (goal_LV - goal_lse_L1).exp_()
    distance_L1 = torch.linalg.vecdot(goal_p_LV, goal_LV - warm_LV)[:, None]
    divergence = ((distance_L1 - goal_lse_L1 + warm_lse_L1) * mask_L1).sum() * temperature**2

    lse_L1 = warm_lse_L1 if temperature == 1 else student_LV.logsumexp(-1, keepdim=True)
    surprise = ((lse_L1 - student_LV.gather(-1, targets_L[:, None])) * mask_L1).sum()

    gradient_LV = (warm_LV - warm_lse_L1).exp_().sub_(goal_p_LV).mul_(mask_L1 * (temperature * kl))
    if cross_entropy:
        pull_LV = (student_LV - lse_L1).exp_().mul_(mask_L1 * cross_entropy)
        pull_LV.scatter_add_(-1, targets_L[:, None], -mask_L1 * cross_entropy)
        gradient_LV = gradient_LV.add_(pull_LV)
    return gradient_LV, divergence, surprise
