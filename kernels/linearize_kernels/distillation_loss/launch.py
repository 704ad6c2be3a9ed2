"""The Triton kernel of triton.py as an operation of torch. Shape legend in __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.distillation_loss import triton as kernels
from linearize_kernels.operations import operation


def _new_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    student_LV = arguments[0]
    gradient_LV = torch.empty(student_LV.shape, dtype=student_LV.dtype, device=student_LV.device)
    kl_L, surprise_L = (student_LV.new_empty(len(student_LV), dtype=torch.float32) for _ in range(2))
    return gradient_LV, kl_L, surprise_L


@operation("distillation_rows", _new_outputs)
def distillation_rows(
    student_LV: Tensor, teacher_LV: Tensor, targets_L: Tensor, mask_L: Tensor, kl: float, cross_entropy: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient in the student's dtype, and KL times temperature^2 and cross-entropy of each token in fp32.

    Logits have unit stride in the last dimension.
    """
    flags = (temperature != 1, cross_entropy != 0)
    forms = tuple((x.shape, x.stride(), x.dtype) for x in (student_LV, teacher_LV))
    kernel = plan_for(
        ("distillation_rows", student_LV.device, flags, *forms), lambda: _bind(student_LV, teacher_LV, flags)
    )
    found = _new_outputs(student_LV)
    kernel((student_LV, teacher_LV, targets_L, mask_L, *found), kl, cross_entropy, temperature)
    return found


def _bind(student_LV: Tensor, teacher_LV: Tensor, flags: tuple[bool, bool]) -> Bound:
    length, width = student_LV.shape
    chosen = launch("distillation_rows", student_LV.dtype, 16, "rows")
    constants = {"C": chosen.chunk, "WARM": flags[0], "SURPRISED": flags[1]}
    constants |= {"num_warps": chosen.warps, "num_stages": chosen.stages}
    numbers = (student_LV.stride(0), teacher_LV.stride(0), width)
    return Bound(kernels.distillation_rows, (length,), numbers, constants, student_LV.device)
