"""Objectives as pure functions of tensors.

Shape legend: B batch, T tokens, H query heads, V value width (in distillation: vocabulary), D model width, L = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize_kernels import LossWeights, distillation_terms
from linearize_kernels.backend import device_kind

RowWeights = Callable[[int, int], Tensor]
Head = Callable[[Tensor], Tensor]


def output_mse(student_BTHV: Tensor, teacher_BTHV: Tensor) -> Tensor:
    """Mean squared difference of mixed values before the output projection (arXiv 2410.10254, stage 1)."""
    return F.mse_loss(student_BTHV.float(), teacher_BTHV.float())


def relative_error(student_BTHV: Tensor, teacher_BTHV: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 over the whole layer: 0 is perfect, 1 is as bad as answering zero.

    Absolute errors grow with depth because activations do; this one compares layers.
    """
    error: Tensor = _RelativeError.apply(student_BTHV, teacher_BTHV)
    return error


class _RelativeError(torch.autograd.Function):
    """Written out because it runs in every layer: half the launches, and one fp32 copy instead of two in memory."""

    @staticmethod
    def forward(ctx: Any, student_BTHV: Tensor, teacher_BTHV: Tensor) -> Tensor:
        difference_BTHV = student_BTHV.to(torch.float32, copy=True).sub_(teacher_BTHV)
        energy = torch.linalg.vector_norm(teacher_BTHV, dtype=torch.float32).square_()
        energy.clamp_min_(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(difference_BTHV, energy)
        ctx.dtype = student_BTHV.dtype
        return torch.linalg.vector_norm(difference_BTHV).square_().div_(energy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        difference_BTHV, energy = ctx.saved_tensors
        return difference_BTHV.mul(gradients[0] * 2 / energy).to(ctx.dtype), None


def hidden_distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """L2 distance over the model width, mean over tokens: hidden-state alignment after the output projection.

    It is an absolute length, in the units of the hidden states (arXiv 2408.10189, stage 2). Where the two are equal the
    gradient is 0.
    """
    return torch.linalg.vector_norm(student_BTD.float() - teacher_BTD.float(), dim=-1).mean()


def matrix_distance(teacher: RowWeights, student: RowWeights, length: int, block: int = 128) -> Tensor:
    """Matrix orientation: mean over batch and heads of |A - M|_F / sqrt(T) (arXiv 2408.10189, stage 1).

    A is the teacher's T x T attention matrix, M what the student mixes its values with, and the Frobenius norm is the
    root of the sum of squares over the whole matrix of one head. Divided by sqrt(T) it is the root mean square, over
    queries, of the L2 distance between the two rows: it does not grow with the length, as the norm itself does. Where A
    and M are equal the gradient is 0. Rows are formed as in `attention_cross_entropy`: memory is B * H * block * T.
    """

    def squares(start: int, stop: int) -> Tensor:
        return (teacher(start, stop) - student(start, stop)).square().sum((-2, -1))

    total_BH = torch.stack(_by_blocks(squares, length, block)).sum(0) / length
    return total_BH.clamp_min(torch.finfo(total_BH.dtype).tiny).sqrt().mean()


def attention_cross_entropy(teacher: RowWeights, student: RowWeights, length: int, block: int = 128) -> Tensor:
    """Cross-entropy of the student's attention rows under the teacher's, mean over batch, heads and queries, in nats.

    Minimising it minimises KL(teacher || student) (arXiv 2402.04347, "attention weight distillation"). Rows are formed
    `block` at a time and again in the backward pass, so memory is B * H * block * T, never T * T.
    """

    def block_sum(start: int, stop: int) -> Tensor:
        target_BHRT, weight_BHRT = teacher(start, stop), student(start, stop)
        return -(target_BHRT * weight_BHRT.clamp_min(1e-12).log()).sum(-1).mean((0, 1)).sum()

    return torch.stack(_by_blocks(block_sum, length, block)).sum() / length


def _by_blocks(part: RowWeights, length: int, block: int) -> list[Tensor]:
    """`part(start, stop)` of every block of rows; what it computes on the way is computed again in the backward.

    Nothing in it is random: no random state is kept for it, which a CUDA graph could not fetch.
    """
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return [again(start, min(start + block, length)) for start in range(0, length, block)]


class DistillationLoss(NamedTuple):
    """Means over target tokens, in nats."""

    loss: Tensor  # kl_weight * kl + ce_weight * cross_entropy; carries the gradient
    kl: Tensor  # KL(teacher || student) at the given temperature, times temperature^2
    cross_entropy: Tensor  # of the next token, at temperature 1


class Heads(NamedTuple):
    """Maps from hidden states [L, D] to logits. The gradient of `trained`, parameters of the student's, is computed."""

    student: Head
    teacher: Head
    trained: tuple[nn.Parameter, ...] = ()


def distillation_loss(
    student_LD: Tensor,
    teacher_LD: Tensor,
    heads: Heads,
    targets_L: Tensor,
    mask_L: Tensor,
    weights: "DistillationWeights",
) -> DistillationLoss:
    """KL to the teacher plus next-token cross-entropy, in chunks: no [L, vocabulary] tensor ever exists.

    Args:
        student_LD: final hidden states of the student; the gradient flows into them.
        teacher_LD: final hidden states of the teacher.
        heads: from hidden states to logits; one and the same where the student's is the teacher's.
        targets_L: next tokens.
        mask_L: True where there is a target.
        weights: of the two terms, and the temperature.

    The KL term is multiplied by temperature^2, which keeps its gradient comparable over temperatures (arXiv
    1503.02531). Both terms are means over the targets: dividing by the batch size only, as `batchmean` over
    [B, T, V] does, makes them grow with T.
    """

    def terms(hidden_LD: Tensor, part: slice) -> tuple[Tensor, ...]:
        goal_LD = teacher_LD[part].detach()
        return _chunk(hidden_LD, goal_LD, heads, targets_L[part], mask_L[part], LossWeights(*weights[:3]))

    return in_chunks(terms, student_LD, mask_L, weights, heads.trained)


CHUNK = {"cpu": 128, "cuda": 2048}
"""Default chunk: on a CPU, 128 rows of a 49K vocabulary stay in its cache, which makes the loss three times faster."""


class DistillationWeights(NamedTuple):
    kl: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    chunk: int | None = None  # tokens whose logits exist at one time; None = CHUNK of the device


ChunkTerms = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""Of a chunk's hidden states [chunk, D], which want a gradient, and its place: the sums of KL and cross-entropy, and
the gradients of their weighted sum for the hidden states and for each trained parameter of the head.
"""


def in_chunks(
    terms: ChunkTerms, student_LD: Tensor, mask_L: Tensor, weights: DistillationWeights, trained: Sequence[nn.Parameter]
) -> DistillationLoss:
    """Means over the targets of what `terms` finds chunk by chunk; each chunk's gradients come right after its loss."""
    return DistillationLoss(*_InChunks.apply(student_LD, terms, mask_L, weights, *trained))


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_LD: Tensor, terms: ChunkTerms, mask_L: Tensor, weights: DistillationWeights, *trained: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = mask_L.sum().clamp_min(1)
        gradient_LD = torch.empty_like(student_LD)
        head_gradients = [torch.zeros_like(parameter) for parameter in trained]
        kl, cross_entropy = torch.zeros(2, device=student_LD.device).unbind()
        chunk = weights.chunk or CHUNK[device_kind(student_LD)]
        for start in range(0, len(mask_L), chunk):
            part = slice(start, start + chunk)
            hidden_LD = student_LD[part].detach().requires_grad_()
            chunk_kl, chunk_cross_entropy, gradient_LD[part], *more = terms(hidden_LD, part)
            for total, gradient in zip(head_gradients, more, strict=True):
                total += gradient
            kl, cross_entropy = kl + chunk_kl, cross_entropy + chunk_cross_entropy
        ctx.save_for_backward(gradient_LD / count, *(gradient.div_(count) for gradient in head_gradients))
        kl, cross_entropy = kl / count, cross_entropy / count
        ctx.mark_non_differentiable(kl, cross_entropy)
        return weights.kl * kl + weights.cross_entropy * cross_entropy, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient_LD, *head_gradients = ctx.saved_tensors
        scaled = (gradient * gradients[0] for gradient in head_gradients)
        return gradient_LD * gradients[0], None, None, None, *scaled


# Six parameters: a chunk of every tensor there is. A function, so that one chunk's logits are gone before the next's.
def _chunk(
    hidden_LD: Tensor, teacher_LD: Tensor, heads: Heads, targets_L: Tensor, mask_L: Tensor, weights: LossWeights
) -> tuple[Tensor, ...]:
    """The two sums of a chunk of tokens, and the gradients of its hidden states and of what trains in the head."""
    teacher_LV = heads.teacher(teacher_LD)
    with torch.enable_grad():
        student_LV = heads.student(hidden_LD)
    terms = distillation_terms(student_LV.detach(), teacher_LV, targets_L, mask_L, weights)
    del teacher_LV
    gradients = torch.autograd.grad(student_LV, [hidden_LD, *heads.trained], terms.gradient_LV)
    return terms.kl, terms.cross_entropy, *gradients
