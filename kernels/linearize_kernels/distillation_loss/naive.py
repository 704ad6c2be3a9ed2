"""Definition of the distillation loss, differentiated by torch. Legend in __init__.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_distillation_terms(
    student_LV: Tensor, teacher_LV: Tensor, targets_L: Tensor, mask_L: Tensor, kl: float, cross_entropy: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of the weighted sum, and the two sums."""
    with torch.enable_grad():
        leaf_LV = student_LV.detach().requires_grad_()
        log_p_LV = F.log_softmax(teacher_LV / temperature, -1)
        log_q_LV = F.log_softmax(leaf_LV / temperature, -1)
        divergence_L = (log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1) * temperature**2
        surprise_L = F.cross_entropy(leaf_LV, targets_L, reduction="none")
        sums = torch.where(mask_L, divergence_L, 0).sum(), torch.where(mask_L, surprise_L, 0).sum()
        (gradient_LV,) = torch.autograd.grad(kl * sums[0] + cross_entropy * sums[1], leaf_LV)
    return gradient_LV, sums[0].detach(), sums[1].detach()
