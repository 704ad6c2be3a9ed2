"""Losses and their gradients against plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.losses import (
    DistillationWeights,
    Heads,
    attention_cross_entropy,
    distillation_loss,
    hidden_distance,
    matrix_distance,
    output_mse,
    relative_error,
)

LENGTH, WIDTH, VOCABULARY = 29, 8, 31


def case(length: int = LENGTH, masked: float = 0.3) -> tuple[Tensor, Tensor, Heads, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    student_LD, teacher_LD = 2 * torch.randn(length, WIDTH), 2 * torch.randn(length, WIDTH)
    mask_L = torch.rand(length) >= masked
    return student_LD.requires_grad_(), teacher_LD, Heads(head, head), torch.randint(VOCABULARY, (length,)), mask_L


def plain(
    student_LD: Tensor, teacher_LD: Tensor, heads: Heads, targets_L: Tensor, mask_L: Tensor, w: DistillationWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64, with all logits at once and torch's own losses."""
    assert isinstance(heads.student, nn.Linear)
    assert isinstance(heads.teacher, nn.Linear)
    student = student_LD.double()[mask_L] @ heads.student.weight.double().T
    teacher = teacher_LD.double()[mask_L] @ heads.teacher.weight.double().T
    student_log, teacher_log = (F.log_softmax(x / w.temperature, -1) for x in (student, teacher))
    kl = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * w.temperature**2
    cross_entropy = F.cross_entropy(student, targets_L[mask_L])
    return w.kl * kl + w.cross_entropy * cross_entropy, kl, cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, LENGTH, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_distillation_equals_the_plain_losses(chunk: int, temperature: float, weights: tuple[float, float]) -> None:
    arguments, settings = case(), DistillationWeights(*weights, temperature, chunk)
    found = distillation_loss(*arguments, settings)
    expected = plain(*arguments, settings)
    for got, wanted in zip(found, expected, strict=True):
        assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    scale = 3.7  # what comes from above is multiplied in
    (gradient,) = torch.autograd.grad(found.loss * scale, arguments[0])
    (wanted,) = torch.autograd.grad(expected[0] * scale, arguments[0])
    torch.testing.assert_close(gradient, wanted.float(), rtol=1e-5, atol=1e-6)
    assert not gradient[~arguments[4]].any()


def test_only_the_loss_carries_a_gradient() -> None:
    found = distillation_loss(*case(), DistillationWeights())
    assert found.loss.requires_grad
    assert not found.kl.requires_grad
    assert not found.cross_entropy.requires_grad


def test_uninitialised_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, float("nan")))
    arguments = case()
    distillation_loss(*arguments, DistillationWeights(chunk=10)).loss.backward()
    assert torch.isfinite(arguments[0].grad).all()  # type: ignore[arg-type]


def test_no_logits_of_the_whole_batch_exist() -> None:
    student, teacher, heads, targets, mask = case()
    sizes = []

    def watched(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return heads.student(hidden)

    distillation_loss(student, teacher, Heads(watched, watched), targets, mask, DistillationWeights(chunk=8))
    assert max(sizes) == 8
    assert sum(sizes) == 2 * LENGTH


def test_nothing_to_learn_from_is_zero_not_nan() -> None:
    arguments = case(masked=1.1)
    found = distillation_loss(*arguments, DistillationWeights(1.0, 1.0))
    found.loss.backward()
    assert [term.item() for term in found] == [0, 0, 0]
    assert not arguments[0].grad.any()  # type: ignore[union-attr]


def test_a_perfect_student_has_no_kl() -> None:
    student, _, heads, targets, mask = case()
    found = distillation_loss(student, student.detach(), heads, targets, mask, DistillationWeights())
    found.loss.backward()
    assert found.kl.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("times", [2, 5])
def test_distillation_is_a_mean_over_tokens(times: int) -> None:
    """The same tokens several times, as more rows or as longer ones: the same loss."""
    student, teacher, heads, targets, mask = case()
    settings = DistillationWeights(1.0, 0.5)
    once = distillation_loss(student, teacher, heads, targets, mask, settings)
    more = distillation_loss(
        student.repeat(times, 1), teacher.repeat(times, 1), heads, targets.repeat(times), mask.repeat(times), settings
    )
    for one, several in zip(once, more, strict=True):
        assert several.item() == pytest.approx(one.item(), rel=1e-5)


def test_bf16_hidden_states_get_bf16_gradients_of_fp32_losses() -> None:
    student, teacher, heads, targets, mask = case()
    assert isinstance(heads.student, nn.Linear)
    heads.student.bfloat16()  # the teacher's too
    low = student.detach().bfloat16().requires_grad_()
    found = distillation_loss(low, teacher.bfloat16(), heads, targets, mask, DistillationWeights(1.0, 1.0))
    expected = plain(low, teacher.bfloat16(), heads, targets, mask, DistillationWeights(1.0, 1.0))
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=0.02)
    (gradient,) = torch.autograd.grad(found.loss, low)
    (wanted,) = torch.autograd.grad(expected[0], low)
    assert gradient.dtype == torch.bfloat16
    assert (gradient - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 2.0)])
def test_a_head_that_trains_gets_its_gradient(chunk: int, weights: tuple[float, float]) -> None:
    """The student's own head, apart from the teacher's."""
    student, teacher, heads, targets, mask = case()
    own = nn.Linear(WIDTH, VOCABULARY, bias=False)
    heads = Heads(own, heads.teacher, (own.weight,))
    settings = DistillationWeights(*weights, 2.0, chunk)
    found = distillation_loss(student, teacher, heads, targets, mask, settings)
    expected = plain(student, teacher, heads, targets, mask, settings)
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    gradients = torch.autograd.grad(found.loss * 1.7, (student, own.weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected[0] * 1.7, (student, own.weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_hide_the_heads_gradient() -> None:
    """Autocast keeps the bf16 copy of a weight that it made without gradients, and would go on with it."""
    student, teacher, heads, targets, mask = case()
    own = nn.Linear(WIDTH, VOCABULARY, bias=False)
    settings, gradients = DistillationWeights(chunk=7), []
    for precise in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss = distillation_loss(
                student, teacher, Heads(own, heads.teacher, (own.weight,)), targets, mask, settings
            )
        gradients.append(torch.autograd.grad(loss.loss, own.weight)[0])
    assert gradients[0].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def rows_of(logits_BHTT: Tensor) -> Tensor:
    causal = torch.ones(logits_BHTT.shape[-2:], dtype=torch.bool).tril()
    return logits_BHTT.masked_fill(~causal, float("-inf")).softmax(-1)


@pytest.mark.parametrize("block", [1, 5, 13, 64])
def test_attention_cross_entropy_is_its_definition(block: int) -> None:
    torch.manual_seed(0)
    teacher = rows_of(torch.randn(2, 3, 13, 13, dtype=torch.float64))
    logits = torch.randn(2, 3, 13, 13, dtype=torch.float64, requires_grad=True)
    found = attention_cross_entropy(
        lambda start, stop: teacher[:, :, start:stop], lambda start, stop: rows_of(logits)[:, :, start:stop], 13, block
    )
    total = 0
    for b in range(2):
        for h in range(3):
            for i in range(13):
                weights = rows_of(logits)[b, h, i, : i + 1]
                total = total - (teacher[b, h, i, : i + 1] * weights.log()).sum()
    expected = total / (2 * 3 * 13)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


@pytest.mark.parametrize("times", [1, 4])
def test_attention_cross_entropy_does_not_grow_with_the_batch(times: int) -> None:
    torch.manual_seed(0)
    teacher, student = (rows_of(torch.randn(1, 2, 9, 9)) for _ in range(2))
    once = attention_cross_entropy(lambda a, b: teacher[:, :, a:b], lambda a, b: student[:, :, a:b], 9)
    many = attention_cross_entropy(
        lambda a, b: teacher[:, :, a:b].repeat(times, times, 1, 1),
        lambda a, b: student[:, :, a:b].repeat(times, times, 1, 1),
        9,
    )
    torch.testing.assert_close(many, once)


def test_a_weight_of_zero_costs_much_but_not_infinity() -> None:
    teacher, student = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0]]]])
    found = attention_cross_entropy(lambda a, b: teacher, lambda a, b: student, 1)
    assert found.item() == pytest.approx(0.5 * 12 * 2.302585, rel=1e-4)


def test_errors_of_outputs() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    squared = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    energy = sum(a**2 for a in teacher.flatten().tolist())
    assert output_mse(student, teacher).item() == pytest.approx(squared / teacher.numel(), rel=1e-5)
    assert relative_error(student, teacher).item() == pytest.approx(squared / energy, rel=1e-5)
    assert relative_error(teacher, teacher).item() == 0
    assert relative_error(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    repeated = [tensor.repeat(3, 2, 1, 1) for tensor in (student, teacher)]
    assert relative_error(*repeated).item() == pytest.approx(squared / energy, rel=1e-5)
    assert output_mse(*repeated).item() == pytest.approx(squared / teacher.numel(), rel=1e-5)
    assert output_mse(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("block", [1, 5, 13, 64])
def test_matrix_distance_is_its_definition(block: int) -> None:
    torch.manual_seed(0)
    teacher = rows_of(torch.randn(2, 3, 13, 13, dtype=torch.float64))
    student = torch.randn(2, 3, 13, 13, dtype=torch.float64).tril().requires_grad_()
    found = matrix_distance(lambda a, b: teacher[:, :, a:b], lambda a, b: student[:, :, a:b], 13, block)
    norms = [torch.linalg.matrix_norm(teacher[b, h] - student[b, h], "fro") for b in range(2) for h in range(3)]
    expected = sum(norms) / 6 / 13**0.5
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


def test_matrix_distance_does_not_grow_with_batch_or_length() -> None:
    """Twice the rows; and twice the length, as two documents of the same tokens."""
    torch.manual_seed(0)
    teacher, student = (rows_of(torch.randn(1, 2, 9, 9)) for _ in range(2))
    twice = [
        torch.stack([torch.block_diag(h, h) for h in matrix[0]])[None].repeat(3, 1, 1, 1)
        for matrix in (teacher, student)
    ]
    once = matrix_distance(lambda a, b: teacher[:, :, a:b], lambda a, b: student[:, :, a:b], 9)
    many = matrix_distance(lambda a, b: twice[0][:, :, a:b], lambda a, b: twice[1][:, :, a:b], 18)
    torch.testing.assert_close(many, once)


def test_hidden_distance_is_its_definition() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    pairs = zip(student.double().flatten(0, 1), teacher.double().flatten(0, 1), strict=True)
    lengths = [sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for one, other in pairs]
    assert hidden_distance(student, teacher).item() == pytest.approx((sum(lengths) / 10).item(), rel=1e-6)
    assert hidden_distance(student.repeat(3, 2, 1), teacher.repeat(3, 2, 1)).item() == pytest.approx(
        (sum(lengths) / 10).item(), rel=1e-6
    )
    assert hidden_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_a_difference_of_zero_has_a_gradient_of_zero() -> None:
    """Of the whole, of one head, and of one token: the derivative of a root at 0 must not become NaN."""
    torch.manual_seed(0)
    teacher = rows_of(torch.randn(1, 2, 6, 6))
    for off in (0.0, 1.0):
        student = (teacher + off * torch.tensor([0.0, 1.0])[:, None, None]).requires_grad_()
        loss = matrix_distance(lambda a, b: teacher[:, :, a:b], lambda a, b, s=student: s[:, :, a:b], 6)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(off * 0.5 * 6**0.5, abs=1e-6)
        assert torch.isfinite(gradient).all()
        assert not gradient[:, 0].any()
        hidden = teacher.clone()
        hidden[0, 0, 0] += off
        hidden.requires_grad_()
        (gradient,) = torch.autograd.grad(hidden_distance(hidden, teacher), hidden)
        assert torch.isfinite(gradient).all()
        assert not gradient[0, 1:].any()
