"""The distillation loss in one launch, in Triton: each logit is read twice, its gradient written once.

A program walks the vocabulary of one token twice: once for the two normalisers and the distance, once for the gradient.
Every lane keeps sums of its own, relative to the largest logit it has met; they come together at the end. Legend in
__init__.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # not -inf: the difference of two of them is NaN


@triton.jit
def load_logits(base, first, width, C: tl.constexpr):
    """[C] fp32 logits from column `first` on; LOWEST outside."""
    column = first + tl.arange(0, C)
    return tl.load(base + column, mask=column < width, other=LOWEST).to(tl.float32)


@triton.jit
def add_exponentials(top, total, x):
    """Running maximum and sum of exponentials of each lane; the factor and the term that the sum moved by."""
    new = tl.maximum(top, x)
    factor, term = tl.exp(top - new), tl.exp(x - new)
    return new, total * factor + term, factor, term


@triton.jit
def join(top, total):
    """log sum exp over the lanes as the maximum and what it exceeds it by (their sum would round both), and what each
    lane's sums are multiplied with.
    """
    highest = tl.max(top, 0)
    scale = tl.exp(top - highest)
    return highest, tl.log(tl.sum(total * scale, 0)), scale


@triton.jit
def distillation_rows(student, teacher, targets, mask, gradient, kl_rows, surprise_rows, kl_weight, surprise_weight,
                      heat, student_row, teacher_row, width, C: tl.constexpr, WARM: tl.constexpr,
                      SURPRISED: tl.constexpr):  # fmt: skip
    """One token: its KL times temperature^2, its cross-entropy, and their weighted gradient. Grid: L tokens.

    WARM: the temperature is not 1. SURPRISED: the cross-entropy has a weight.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    gradient += row * width
    if tl.load(mask + row) == 0:
        for first in range(0, width, C):
            column = first + tl.arange(0, C)
            tl.store(gradient + column, tl.zeros((C,), gradient.dtype.element_ty), mask=column < width)
        tl.store(kl_rows + row, 0.0)
        tl.store(surprise_rows + row, 0.0)
    else:
        cold = 1.0 / heat
        top_q = tl.full((C,), LOWEST, tl.float32)
        top_p = tl.full((C,), LOWEST, tl.float32)
        top = tl.full((C,), LOWEST, tl.float32)
        sum_q = tl.zeros((C,), tl.float32)
        sum_p = tl.zeros((C,), tl.float32)
        total = tl.zeros((C,), tl.float32)
        distance = tl.zeros((C,), tl.float32)
        for first in range(0, width, C):
            s = load_logits(student, first, width, C)
            t = load_logits(teacher, first, width, C)
            warm = s
            if WARM:
                top, total, _, _ = add_exponentials(top, total, s)
                warm, t = s * cold, t * cold
            top_q, sum_q, _, _ = add_exponentials(top_q, sum_q, warm)
            top_p, sum_p, factor, term = add_exponentials(top_p, sum_p, t)
            inside = first + tl.arange(0, C) < width
            distance = distance * factor + tl.where(inside, term * (t - warm), 0.0)
        high_q, rest_q, _ = join(top_q, sum_q)
        high_p, rest_p, scale = join(top_p, sum_p)
        high, rest = high_q, rest_q
        if WARM:
            high, rest, _ = join(top, total)
        kl = tl.sum(distance * scale, 0) * tl.exp(-rest_p) + (high_q - high_p) + (rest_q - rest_p)
        target = tl.load(targets + row)
        tl.store(kl_rows + row, kl * heat * heat)
        tl.store(surprise_rows + row, high - tl.load(student + target).to(tl.float32) + rest)
        for first in range(0, width, C):
            column = first + tl.arange(0, C)
            s = load_logits(student, first, width, C)
            t = load_logits(teacher, first, width, C)
            warm = s
            if WARM:
                warm, t = s * cold, t * cold
            pull = (tl.exp(warm - high_q - rest_q) - tl.exp(t - high_p - rest_p)) * (kl_weight * heat)
            if SURPRISED:
                pull += (tl.exp(s - high - rest) - tl.where(column == target, 1.0, 0.0)) * surprise_weight
            tl.store(gradient + column, pull.to(gradient.dtype.element_ty), mask=column < width)
