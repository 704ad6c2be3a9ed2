"""Distillation from the teacher's likeliest tokens: its k largest logits and the weight of all the others together.

Shape legend: B batch, T tokens, L = B * T, V vocabulary, K entries kept, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize.losses import CHUNK, DistillationLoss, DistillationWeights, Head, Heads, in_chunks


class TopK(NamedTuple):
    """What is kept of a teacher's logits; the leading dimensions are [B, T] or [L].

    Attributes:
        values: the K largest logits, largest first, in the dtype they came in.
        indices: of these in the vocabulary, uint16 where that is enough, else int32.
        lse: fp32, log-sum-exp of all logits divided by the temperature: it tells the weight of those not kept.
    """

    values: Tensor
    indices: Tensor
    lse: Tensor

    def flat(self) -> "TopK":
        """[B, T, …] as [L, …]."""
        return TopK(self.values.flatten(0, 1), self.indices.flatten(0, 1), self.lse.flatten())


def top_k(hidden_BTD: Tensor, head: Head, k: int, temperature: float = 1.0, chunk: int | None = None) -> TopK:
    """The k largest logits of every token; no [L, V] tensor ever exists.

    Args:
        hidden_BTD: final hidden states of the teacher.
        head: from hidden states to logits.
        k: entries to keep, at most V.
        temperature: that the loss will have.
        chunk: tokens whose logits exist at one time; None = as in distillation.
    """
    found: list[TopK] = []
    for part_LD in hidden_BTD.flatten(0, 1).split(chunk or CHUNK[hidden_BTD.device.type]):
        logits_LV = head(part_LD)
        values, indices = logits_LV.topk(k, dim=-1)
        narrow = torch.uint16 if logits_LV.shape[-1] <= 2**16 else torch.int32
        found.append(TopK(values, indices.to(narrow), (logits_LV.float() / temperature).logsumexp(-1)))
    return TopK(*(torch.cat(parts).unflatten(0, hidden_BTD.shape[:2]) for parts in zip(*found, strict=True)))


# More parameters than the style allows: those of `losses.distillation_loss`, with the targets for the hidden states.
def topk_distillation_loss(
    student_LD: Tensor,
    teacher: TopK,
    heads: Heads,
    targets_L: Tensor,
    mask_L: Tensor,
    weights: DistillationWeights,
) -> DistillationLoss:
    """KL over the teacher's K likeliest tokens and one bucket for the rest, plus next-token cross-entropy.

    With p and q of teacher and student at temperature c, S the kept tokens and r = 1 - sum over S:

        KL_k = c^2 (sum_S p_i log(p_i / q_i) + p_r log(p_r / q_r))

    It is KL between the two distributions after all other tokens were merged into one, so never above KL itself, and
    KL where S is the whole vocabulary. Its gradient is c (q_i - p_i) for the logits in S and c q_i (1 - p_r / q_r) for
    the others: they are scaled together and keep the student's own proportions. Means are over the targets. The form
    is common knowledge; we follow no paper.

    Args:
        student_LD: final hidden states of the student; the gradient flows into them.
        teacher: [L, K], made for the temperature of `weights`.
        heads: the student's is used.
        targets_L: next tokens.
        mask_L: True where there is a target.
        weights: of the two terms, and the temperature.
    """

    def terms(hidden_LD: Tensor, part: slice) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            student_LV = heads.student(hidden_LD)
        goal = TopK(*(tensor[part] for tensor in teacher))
        gradient_LV, kl = _kl_terms(student_LV.detach(), goal, mask_L[part], weights)
        cross_entropy = _add_cross_entropy(
            gradient_LV, student_LV.detach(), targets_L[part], mask_L[part], weights.cross_entropy
        )
        gradient_LV = gradient_LV.to(student_LV.dtype)
        return kl, cross_entropy, *torch.autograd.grad(student_LV, [hidden_LD, *heads.trained], gradient_LV)

    return in_chunks(terms, student_LD, mask_L, weights, heads.trained)


def _kl_terms(student_LV: Tensor, teacher: TopK, mask_L: Tensor, weights: DistillationWeights) -> tuple[Tensor, Tensor]:
    """The gradient of kl_weight × KL_k with respect to the student's logits, and KL_k itself, summed over tokens."""
    dtype, heat = torch.promote_types(student_LV.dtype, torch.float32), weights.temperature
    warm_LV, mask_L1 = student_LV.to(dtype) / heat, mask_L[:, None].to(dtype)
    lse_L1, index_LK = warm_LV.logsumexp(-1, keepdim=True), teacher.indices.long()
    log_p_LK = teacher.values.to(dtype) / heat - teacher.lse[:, None].to(dtype)
    p_LK = log_p_LK.exp()
    kl_L1 = (p_LK * (log_p_LK - warm_LV.gather(-1, index_LK) + lse_L1)).sum(-1, keepdim=True)
    gradient_LV = (warm_LV - lse_L1).exp_()
    if index_LK.shape[-1] < student_LV.shape[-1]:
        rest_LV = warm_LV.scatter(-1, index_LK, float("-inf"))
        rest_lse_L1 = rest_LV.logsumexp(-1, keepdim=True)
        rest_p_L1 = (1 - p_LK.sum(-1, keepdim=True)).clamp_min(0)
        log_rest_p_L1 = rest_p_L1.clamp_min(torch.finfo(dtype).tiny).log()
        kl_L1 = kl_L1 + rest_p_L1 * (log_rest_p_L1 - rest_lse_L1 + lse_L1)
        gradient_LV.sub_(rest_LV.sub_(rest_lse_L1).exp_().mul_(rest_p_L1))
    gradient_LV.scatter_add_(-1, index_LK, -p_LK).mul_(mask_L1 * (heat * weights.kl))
    return gradient_LV, (kl_L1 * mask_L1).sum() * heat**2


def _add_cross_entropy(
    gradient_LV: Tensor, student_LV: Tensor, targets_L: Tensor, mask_L: Tensor, weight: float
) -> Tensor:
    """The cross-entropy summed over tokens; its gradient, times its weight, is added in place."""
    student_LV, mask_L1 = student_LV.to(gradient_LV.dtype), mask_L[:, None].to(gradient_LV.dtype)
    lse_L1 = student_LV.logsumexp(-1, keepdim=True)
    if weight:
        gradient_LV.add_((student_LV - lse_L1).exp_().mul_(mask_L1 * weight))
        gradient_LV.scatter_add_(-1, targets_L[:, None], -mask_L1 * weight)
    return ((lse_L1 - student_LV.gather(-1, targets_L[:, None])) * mask_L1).sum()
