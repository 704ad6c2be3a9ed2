"""What each student layer does on a short text, beside its teacher: entropy, KL, monotonicity, relative error.

Every layer gets its teacher layer's input, so that errors do not add up over layers. Row weights are compared where the
mixer has rows that sum to 1; monotonicity, which is about ranks, wherever it has rows.
Shape legend in mixers/base.py; R query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.attention import StudentAttention, full_precision, teacher_rows
from linearize.evals.records import DiagnosticRow
from linearize.mixers import mixer_config
from linearize.readings import Seen, observe
from linearize.surgery import Graft, graft, plan_surgery

TOKENS = 1024
"""Read at most: attention rows are quadratic."""

EDGES = (0, 128, 512)
"""Where ranges of positions begin."""

_ROWS = 128  # query rows at once
_FEWEST = 8  # keys that a row must see for its ranks to mean something
_SMALLEST = 1e-12

Terms = dict[str, tuple[Tensor, Tensor]]
"""By measure: numerators and denominators [H, T] of each head and query; a value is the sum of one over the other's."""


def pair(student: PreTrainedModel, teacher: PreTrainedModel) -> Graft:
    """A loaded student with the teacher it came from as its `teacher`; the teacher is grafted to be observed."""
    entry = student.config.linearize
    count: int = teacher.config.num_hidden_layers
    kept = tuple(index for index in range(count) if index not in entry["layers"])
    observed = graft(teacher, plan_surgery(teacher, mixer_config(entry["mixer"]), kept, replace_sliding=True))
    students = {module.layer_idx: module for module in student.modules() if isinstance(module, StudentAttention)}
    return Graft(student, students, teacher=observed)


@torch.no_grad()
def diagnose(grafted: Graft, input_ids_BT: Tensor) -> list[DiagnosticRow]:
    """All measures of every student layer.

    Args:
        grafted: a student with its teacher.
        input_ids_BT: a text [1, T]; the first TOKENS are read.

    Returns:
        For each layer and measure: of the whole layer, of each head, of each range of positions; and of each head in
        each range.
    """
    input_ids_BT = input_ids_BT[:, :TOKENS].to(grafted.model.device)
    rows: list[DiagnosticRow] = []
    for seen in observe(grafted, input_ids_BT):
        student = grafted.students[seen[0].layer_idx]
        for measure, (above_HT, below_HT) in _terms(student, seen).items():
            rows += _cut(student.layer_idx, measure, above_HT, below_HT)
    return rows


def _terms(student: StudentAttention, seen: Seen) -> Terms:
    teacher, heads, teacher_BTHV = seen
    own = student.project(heads)
    student_BTHV, _ = student.mix(own)
    wrong_HT = (student_BTHV.float() - teacher_BTHV.float()).square().sum((0, 3)).T
    size_HT = teacher_BTHV.float().square().sum((0, 3)).T
    length = size_HT.shape[1]
    found: Terms = {"relative_error": (wrong_HT, size_HT)}
    with full_precision(teacher_BTHV.device):
        theirs = teacher_rows(heads, teacher.shapes)
        found["teacher_entropy"] = _by_rows(theirs, lambda _, weight: _entropy(weight), length)
        if student.mixer.rows == "none":
            return found
        ours, scores = student.mixer.row_weights(own), teacher_rows(own, student.shapes)
        found["monotonicity"] = _by_rows(ours, lambda rows, weight: _spearman(scores(*rows), weight, rows[0]), length)
        if student.mixer.rows == "normalised":
            found["student_entropy"] = _by_rows(ours, lambda _, weight: _entropy(weight), length)
            found["attention_kl"] = _by_rows(ours, lambda rows, weight: _kl(theirs(*rows), weight), length)
    return found


def _by_rows(
    weights: Callable[[int, int], Tensor], measure: Callable[[tuple[int, int], Tensor], Tensor], length: int
) -> tuple[Tensor, Tensor]:
    """`measure` [1, H, R] of blocks of query rows, 0 where it is NaN (means nothing); and 1 where it is not, [H, T]."""
    blocks = [
        measure((start, stop), weights(start, stop).float())[0]
        for start, stop in ((start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))
    ]
    value_HT = torch.cat(blocks, dim=1)
    return value_HT.nan_to_num(), (~value_HT.isnan()).float()


def _entropy(weight_BHRT: Tensor) -> Tensor:
    """In nats, with 0 log 0 = 0."""
    return torch.special.entr(weight_BHRT).sum(-1)


def _kl(teacher_BHRT: Tensor, student_BHRT: Tensor) -> Tensor:
    """sum_j t log(t / s), s at least 1e-12."""
    return (torch.xlogy(teacher_BHRT, teacher_BHRT) - teacher_BHRT * student_BHRT.clamp_min(_SMALLEST).log()).sum(-1)


def _spearman(score_BHRT: Tensor, weight_BHRT: Tensor, first: int) -> Tensor:
    """Rank correlation, over the keys of each row, of q.k (here softmax weights, of the same ranks) and the student's
    weights; 1 = monotonic in q.k, the property that Hedgehog asks for (arXiv 2402.04347). Ties have their mean rank.
    """
    rows, length = score_BHRT.shape[-2:]
    place = torch.arange(length, device=score_BHRT.device)
    last = torch.arange(first, first + rows, device=score_BHRT.device)
    seen_RT = place <= last[:, None]
    left, right = (_centred_ranks(x, seen_RT, last) for x in (score_BHRT, weight_BHRT))
    scale = (left.square().sum(-1) * right.square().sum(-1)).sqrt()
    found = (left * right).sum(-1) / scale
    return found.masked_fill((last + 1 < _FEWEST) | (scale == 0), float("nan"))


def _centred_ranks(x_BHRT: Tensor, seen_RT: Tensor, last_R: Tensor) -> Tensor:
    x_BHRT = x_BHRT.masked_fill(~seen_RT, float("inf")).contiguous()
    ordered = x_BHRT.sort(-1).values
    below, through = torch.searchsorted(ordered, x_BHRT), torch.searchsorted(ordered, x_BHRT, right=True)
    return ((below + through - 1) / 2 - last_R[:, None] / 2) * seen_RT


def _cut(layer: int, measure: str, above_HT: Tensor, below_HT: Tensor) -> Iterator[DiagnosticRow]:
    """The rows of one layer and measure; those without any query are left out."""
    heads, length = above_HT.shape
    starts = [edge for edge in EDGES if edge < length]
    ranges = [None, *zip(starts, [*starts[1:], length], strict=True)]
    for head in (None, *range(heads)):
        for part in ranges:
            start, stop = part or (None, None)
            chosen = (slice(None) if head is None else head, slice(start, stop))
            below = below_HT[chosen].sum().item()
            if below > 0:
                value = above_HT[chosen].sum().item() / below
                yield DiagnosticRow.model_validate(
                    {"layer": layer, "head": head, "start": start, "stop": stop, "measure": measure, "value": value}
                )
