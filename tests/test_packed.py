"""Softmax that is told where documents start sees what a mask of documents lets it see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import tiny_teacher
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from linearize import packed
from linearize.families import FAMILIES
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.packed import attend, softmax_by_document, with_starts
from linearize.recipe import load_recipe
from linearize.stages import Batch, build_stage
from linearize.stages.base import BY_DOCUMENT, run_trunk, softmax_mask
from linearize.stages.distil import DistilConfig
from linearize.stages.transfer import TransferConfig
from linearize.surgery import graft, plan_surgery, sliding_layers
from linearize_kernels import backend

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLD = sorted(name for name in FAMILIES if FAMILIES[name].hands_on and FAMILIES[name].soft_cap is None)


def as_batch(lengths: list[list[int]]) -> Batch:
    """Rows of documents of these lengths."""
    segments_BT = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in lengths])
    positions_BT = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    ids_BT = torch.randint(2, 97, segments_BT.shape, generator=torch.Generator().manual_seed(0))
    targets_BT = torch.zeros_like(segments_BT, dtype=torch.bool)
    targets_BT[:, :-1] = segments_BT[:, 1:] == segments_BT[:, :-1]
    return Batch(ids_BT, positions_BT, segments_BT, targets_BT)


@pytest.fixture
def by_document(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Has layers attend by documents on a CPU too; the starts that reached them."""
    seen: list[Tensor] = []
    mask = packed._mask

    def seeing(starts_S: Tensor, rows: int, length: int) -> Tensor:
        seen.append(starts_S)
        return mask(starts_S, rows, length)

    monkeypatch.setattr(packed, "_mask", seeing)
    monkeypatch.setattr(packed, "_able", lambda *_: True)
    monkeypatch.setattr(packed, "SHORTEST", 0)
    return seen


@pytest.fixture
def of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHORTEST", 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("of_any_length")
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=4))
def test_starts_are_those_of_the_documents(lengths: list[list[int]]) -> None:
    longest = max(map(sum, lengths))
    lengths = [[*row, longest - sum(row)] if sum(row) < longest else row for row in lengths]
    starts_S = with_starts(as_batch(lengths)).starts_S
    assert starts_S is not None
    assert starts_S.dtype == torch.int32
    every = [length for row in lengths for length in row]
    assert [end - start for start, end in pairwise(starts_S.tolist()) if end > start] == every
    documents = len(starts_S) - 1
    assert documents & (documents - 1) == 0
    assert len(every) <= documents < 2 * len(every)


@pytest.mark.usefixtures("of_any_length")
def test_rows_of_one_document_start_at_the_rows() -> None:
    batch = as_batch([[7], [7], [7]])
    starts_S = with_starts(Batch(batch.input_ids_BT, batch.position_ids_BT, None, batch.target_mask_BT)).starts_S
    assert starts_S is not None
    assert starts_S.tolist() == [0, 7, 14, 21, 21]


def test_short_documents_keep_their_mask() -> None:
    assert with_starts(as_batch([[2] * 128])).starts_S is None
    assert with_starts(as_batch([[128] * 3 + [1] * 128])).starts_S is None
    assert with_starts(as_batch([[128] * 4])).starts_S is not None


@pytest.mark.parametrize("family", TOLD)
def test_every_family_hands_on_where_documents_start(family: str, by_document: list[Tensor]) -> None:
    """To the teacher, and to softmax layers that a student keeps."""
    plain = {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": None}
    model = tiny_teacher(family, **{k: v for k, v in plain.items() if hasattr(tiny_teacher(family).config, k)})
    assert not sliding_layers(model)
    grafted, batch = graft(model, plan_surgery(model, HedgehogConfig(), (1,))), as_batch([[10, 1, 13], [24]])
    for teacher in (True, False):
        with torch.no_grad(), grafted.as_teacher() if teacher else nullcontext(model):
            expected = run_trunk(model, batch, softmax_mask(model, batch))
            with softmax_by_document(grafted, "no") as able:
                assert able
                found = run_trunk(model, with_starts(batch), softmax_mask(model, with_starts(batch)))
        assert torch.equal(found, expected)
        assert len(by_document) == (3 if teacher else 1)
        by_document.clear()


@pytest.mark.parametrize("rows", [[[10, 1, 13], [24]], [[24], [24]]])
@pytest.mark.parametrize("kind", ["transfer", "distil", "recomputed"])
def test_stages_learn_the_same(
    make_teacher: Callable[..., PreTrainedModel], by_document: list[Tensor], kind: str, rows: list[list[int]]
) -> None:
    def losses(tell: bool) -> tuple[Tensor, list[Tensor]]:
        model, batch = make_teacher(), as_batch(rows)
        if len(rows[0]) == 1:
            batch = Batch(batch.input_ids_BT, batch.position_ids_BT, None, batch.target_mask_BT)
        torch.manual_seed(0)
        grafted = graft(model, plan_surgery(model, load_recipe("hedgehog").mixer, (2,)))
        again = kind == "recomputed"
        config = (
            TransferConfig(tokens=1) if kind == "transfer" else DistilConfig(tokens=1, checkpoint_activations=again)
        )
        stage = build_stage(config, grafted)
        for parameter in stage.trainable().values():
            parameter.requires_grad_(True)
        with softmax_by_document(grafted, "no") if tell else nullcontext():
            found = stage.train_micro_batch(with_starts(batch) if tell else batch, lambda loss: loss.backward())
        return found["loss"], [p.grad for p in stage.trainable().values() if p.grad is not None]

    (expected, gradients), (found, others) = losses(False), losses(True)
    assert by_document
    torch.testing.assert_close(found, expected)
    assert len(others) == len(gradients) > 0
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def in_place_of_the_kernel(
    q_LHK: Tensor,
    k_LGK: Tensor,
    v_LGV: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    longest: int,
    longest_keys: int,
    *,
    window_size: tuple[int, int],
    scale: float | None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `varlen_attn` computes, document by document, after what it wants of its arguments."""
    assert starts_S is key_starts_S
    assert starts_S.dtype == torch.int32
    assert (starts_S[0], starts_S[-1], window_size) == (0, len(q_LHK), (-1, 0))
    assert int(starts_S.diff().max()) <= longest == longest_keys
    assert enable_gqa or q_LHK.shape[1] == k_LGK.shape[1]
    assert all(head.stride(-1) == 1 for head in (q_LHK, k_LGK, v_LGV))
    mixed = [
        scaled_dot_product_attention(
            *(head[start:end].transpose(0, 1) for head in (q_LHK, k_LGK, v_LGV)),
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(0, 1)
        for start, end in pairwise(starts_S.tolist())
        if end > start
    ]
    return torch.cat(mixed)


@pytest.mark.parametrize("takes_groups", [True, False])
@pytest.mark.parametrize("family", TOLD)
def test_what_the_kernel_is_given(
    family: str, takes_groups: bool, by_document: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another kernel in its place, on a CPU: outputs and gradients are those of softmax with a mask."""
    plain = {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": None}
    model = tiny_teacher(family, **{k: v for k, v in plain.items() if hasattr(tiny_teacher(family).config, k)})
    model.requires_grad_(True)
    grafted, batch = graft(model, plan_surgery(model, HedgehogConfig(), (0, 1, 2))), as_batch([[10, 1, 13], [24]])

    def learnt(given: Batch) -> list[Tensor]:
        model.zero_grad()
        found = run_trunk(model, given, softmax_mask(model, given))
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = learnt(batch)
    monkeypatch.setattr(packed, "varlen_attn", in_place_of_the_kernel)
    monkeypatch.setattr(packed, "TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(packed, "HALVES", (torch.float32,))
    with backend.standing_for("cuda"), softmax_by_document(grafted, "no"):
        found = learnt(with_starts(batch))
    assert by_document == []
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_outside_and_without_documents_it_is_sdpa(
    make_teacher: Callable[..., PreTrainedModel], by_document: list[Tensor], make_tokens: Callable[..., Tensor]
) -> None:
    model, ids = make_teacher(), make_tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = [model(ids, attention_mask=given).logits for given in (None, mask)]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    grafted = graft(model, plan_surgery(model, HedgehogConfig()))
    with softmax_by_document(grafted, "no"), grafted.as_teacher():
        assert model.config._attn_implementation == BY_DOCUMENT
        for given_mask, wanted in zip((None, mask), expected, strict=True):
            assert torch.equal(model(ids, attention_mask=given_mask).logits, wanted)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), generated)
    assert model.config._attn_implementation == "sdpa"
    assert by_document == []


def test_a_slip_does_not_look_ahead(make_teacher: Callable[..., PreTrainedModel], by_document: list[Tensor]) -> None:
    """The mask that stands for the starts masks nothing: who is told nothing else must not follow it."""
    batch, model = with_starts(as_batch([[10, 1, 13], [24]])), make_teacher()
    graft(model, plan_surgery(model, HedgehogConfig(), (1,)))
    with pytest.raises(AssertionError, match="softmax_by_document"):
        softmax_mask(model, batch)
    keeps = tiny_teacher("stablelm")
    grafted = graft(keeps, plan_surgery(keeps, HedgehogConfig(), (1,)))
    with (
        softmax_by_document(grafted, "no"),
        pytest.raises(AssertionError, match="StableLmAttention was not handed where documents start"),
    ):
        run_trunk(keeps, batch, softmax_mask(keeps, batch))


def test_a_block_mask_is_refused_as_ever(make_teacher: Callable[..., PreTrainedModel]) -> None:
    """`cu_seq_lens_q` is what collators of packed rows call it too."""
    batch, model = as_batch([[10, 1, 13], [24]]), make_teacher()
    mask_B1TT = softmax_mask(model, batch)
    graft(model, plan_surgery(model, HedgehogConfig()))
    with pytest.raises(ValueError, match="4 dimensions"):
        model(batch.input_ids_BT, attention_mask=mask_B1TT, cu_seq_lens_q=torch.tensor([0, 10, 11, 24, 48]))


def test_where_it_cannot_be(make_teacher: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def able(model: PreTrainedModel, precision: Any = "bf16") -> bool:
        with (
            backend.standing_for("cuda"),
            softmax_by_document(graft(model, plan_surgery(model, HedgehogConfig(), (1,))), precision) as yes,
        ):
            assert (model.config._attn_implementation == BY_DOCUMENT) == yes
        return yes

    assert able(make_teacher())
    assert not able(make_teacher(), "no")  # fp32
    assert not able(make_teacher(head_dim=512))
    assert not able(make_teacher(head_dim=20))
    eager = make_teacher()
    eager.config._attn_implementation = "eager"
    assert not able(eager)
    assert not able(tiny_teacher("qwen3"))  # slides
    assert not able(tiny_teacher("stablelm"))  # its layers keep to themselves what they do not know
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    for capability, built, expected in (((8, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda found=built: found)
        assert able(make_teacher()) == expected


@pytest.mark.parametrize("groups", [pytest.param(groups, marks=gpu) for groups in (1, 3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_follows_documents(groups: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients against softmax with a mask, in fp64."""
    monkeypatch.setattr(packed, "SHORTEST", 0)
    batch = with_starts(as_batch([[100, 1, 155], [256], [7] * 36 + [4]])).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    heads = [
        torch.randn(3, count, 256, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
        for count in (2 * groups, 2, 2)
    ]
    module: Any = type("Module", (), {"num_key_value_groups": groups, "is_causal": True})()
    exact = [head.detach().to(torch.bfloat16).double().requires_grad_() for head in heads]
    assert batch.starts_S is not None
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        mixed_BTHV, _ = attend(module, *heads, None, scaling=0.2, cu_seq_lens_q=batch.starts_S, max_length_q=256)
    expected_BTHV, _ = attend(module, *exact, None, scaling=0.2, cu_seq_lens_q=batch.starts_S, max_length_q=256)
    assert mixed_BTHV.dtype == torch.bfloat16
    torch.testing.assert_close(mixed_BTHV.double(), expected_BTHV, rtol=2e-2, atol=2e-2)
    weight_BTHV = torch.randn(mixed_BTHV.shape, device="cuda", generator=generator)
    (mixed_BTHV.float() * weight_BTHV).sum().backward()
    (expected_BTHV * weight_BTHV).sum().backward()
    for found, wanted in zip(heads, exact, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=5e-2, atol=5e-2)
