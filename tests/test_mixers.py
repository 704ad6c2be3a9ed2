"""One contract over every mixer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers import HeadInputs, Rope, build_mixer, mixer_config
from linearize.mixers.base import Branch, silenced
from linearize.mixers.swa import Swa, SwaConfig
from linearize.mixers.timeline import first_tokens
from tests.tiny_mixers import (
    CASES,
    HEADS,
    LENGTHS,
    VALUE,
    close,
    cut,
    every_mixer,
    heads_of,
    mixer_of,
    rope_at,
    same_state,
    shapes,
)


@every_mixer
def test_last_tokens_are_mixed_like_others(case: str) -> None:
    mixer, heads = mixer_of(case), heads_of(70)
    whole, _ = mixer(heads)
    assert torch.equal(mixer(replace(heads, last=True))[0], whole)
    _, state = mixer(cut(heads, slice(40)))
    tail = cut(heads, slice(40, None))
    assert torch.equal(mixer(replace(tail, last=True), state)[0], mixer(tail, state)[0])


@every_mixer
@pytest.mark.parametrize("length", LENGTHS)
def test_split_equals_whole(case: str, length: int) -> None:
    mixer, heads = mixer_of(case), heads_of(length)
    whole, end = mixer(heads)
    for first in {1, 63, 64, length // 2, length - 1} & set(range(1, length)):
        head, state = mixer(cut(heads, slice(first)))
        tail, after = mixer(cut(heads, slice(first, None)), state)
        close(torch.cat([head, tail], 1), whole)
        same_state(after, end)


@every_mixer
@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 129), max_size=4))
def test_split_anywhere_equals_whole(case: str, cuts: set[int]) -> None:
    mixer, heads = mixer_of(case), heads_of(130)
    edges, state, found = [0, *sorted(cuts), 130], None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        y, state = mixer(cut(heads, slice(start, stop)), state)
        found.append(y)
    close(torch.cat(found, 1), mixer(heads)[0])


@every_mixer
def test_token_by_token_equals_whole(case: str) -> None:
    mixer, heads = mixer_of(case), heads_of(70)
    state, found = None, []
    for t in range(70):
        y, state = mixer(cut(heads, slice(t, t + 1)), state)
        found.append(y)
    whole, end = mixer(heads)
    close(torch.cat(found, 1), whole)
    assert state is not None
    same_state(state, end)


@every_mixer
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_does_not_change(case: str, length: int) -> None:
    mixer, heads = mixer_of(case), heads_of(1000)
    close(mixer(cut(heads, slice(length)))[0], mixer(heads)[0][:, :length])


@every_mixer
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(case: str, length: int, side: str) -> None:
    mixer, heads, pad = mixer_of(case), heads_of(length), 9
    real = torch.ones(length + pad, dtype=torch.bool)
    real[:pad] = side == "right"
    real[length:] &= side == "left"
    real = real if side == "left" else torch.arange(length + pad) < length
    padded = heads_of(length + pad)  # what stands in the padding is no zero

    def put(name: str) -> Tensor:
        tensor = getattr(padded, name).clone()
        tensor[:, real] = getattr(heads, name)
        return tensor

    tensors = {name: put(name) for name in ("x_BTD", "q_BTHK", "k_BTGK", "v_BTGV")}
    rope = rope_at((real.cumsum(0) - 1).clamp_min(0).expand(2, -1))
    y, state = mixer(HeadInputs(**tensors, rope=rope, mask_BT=real.expand(2, -1)))
    expected, end = mixer(heads)
    close(y[:, real], expected)
    assert torch.isfinite(y).all()
    same_state(state, end)


@every_mixer
def test_packed_documents_are_separate(case: str) -> None:
    mixer, sizes = mixer_of(case), [10, 1, 64, 55, 20]
    positions_T = torch.cat([torch.arange(size) for size in sizes])
    document_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    single = heads_of(150)
    packed = replace(
        single,
        rope=rope_at(torch.stack([positions_T, torch.arange(150)])),
        segments_BT=torch.stack([document_T, torch.zeros(150, dtype=torch.long)]),
    )
    y, _ = mixer(packed)
    for document in range(len(sizes)):
        alone = cut(replace(packed, segments_BT=None), document_T == document, slice(1))
        close(y[:1, document_T == document], mixer(alone)[0])
    close(y[1:], mixer(cut(single, slice(None), slice(1, 2)))[0])


@every_mixer
@pytest.mark.parametrize("length", LENGTHS)
def test_state_has_the_promised_size_whatever_was_read(case: str, length: int) -> None:
    mixer = mixer_of(case, dtype=torch.float32)
    _, state = mixer(heads_of(length, dtype=torch.float32))
    _, state = mixer(heads_of(5, dtype=torch.float32), state)
    assert sum(tensor.nbytes for tensor in state) == 2 * mixer.state_bytes()
    assert sum(tensor.untyped_storage().nbytes() for tensor in state) == 2 * mixer.state_bytes()
    assert all(tensor.shape[0] == 2 for tensor in state)  # batch first


@every_mixer
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_query_head_h_reads_key_head_h_over_group(case: str, key_heads: int) -> None:
    """Repeating the key heads in the input, in HF's order, changes nothing; other batches and groups do not leak."""
    mixer, heads = mixer_of(case, key_heads), heads_of(65, key_heads)
    y, _ = mixer(heads)
    assert y.shape == (2, 65, HEADS, VALUE)
    changed = heads.v_BTGV.clone()
    changed[0, :, 0] += 1
    moved = (mixer(replace(heads, v_BTGV=changed))[0] - y).abs().amax((1, 3)) > 1e-9
    expected = torch.zeros(2, HEADS, dtype=torch.bool)
    expected[0, : HEADS // key_heads] = True
    assert torch.equal(moved, expected)


@every_mixer
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_gradients_are_finite_and_reach_every_parameter(case: str, scale: float) -> None:
    mixer, heads = mixer_of(case, dtype=torch.float32), heads_of(140, dtype=torch.float32)
    heads = replace(heads, q_BTHK=heads.q_BTHK * scale, k_BTGK=heads.k_BTGK * scale)
    inputs = [heads.q_BTHK.requires_grad_(), heads.k_BTGK.requires_grad_(), heads.v_BTGV.requires_grad_()]
    y, _ = mixer(heads)
    assert torch.isfinite(y).all()
    gradients = torch.autograd.grad(y.square().sum(), [*inputs, *mixer.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if scale == 1:
        assert all((gradient != 0).any() for gradient in gradients)
    elif mixer.rows == "normalised":  # values of 1 come out as 1, however far apart queries and keys are
        ones, _ = mixer(replace(heads, v_BTGV=torch.ones_like(heads.v_BTGV)))
        close(ones, torch.ones_like(ones), 1e-4)


@every_mixer
def test_bf16_inputs(case: str) -> None:
    mixer = mixer_of(case, dtype=torch.float32)
    heads = heads_of(200, dtype=torch.bfloat16)
    y, state = mixer(heads)
    step, _ = mixer(cut(heads, slice(1)), state)
    assert y.dtype == step.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in state} <= {torch.float32, torch.bfloat16, torch.int64}
    assert sum(tensor.nbytes for tensor in state) == 2 * mixer.state_bytes(torch.bfloat16)
    tensors = {name: tensor.double() for name, tensor in vars(heads).items() if isinstance(tensor, Tensor)}
    assert heads.rope is not None
    rope = Rope(heads.rope.cos_BTR.double(), heads.rope.sin_BTR.double())
    exact, _ = mixer_of(case)(HeadInputs(**tensors, rope=rope))
    assert torch.isfinite(y).all()
    assert (y.double() - exact).norm() / exact.norm() < 0.01


@every_mixer
def test_no_rope_no_mask_and_no_segments_are_allowed(case: str) -> None:
    y, _ = mixer_of(case)(replace(heads_of(5), rope=None))
    assert torch.isfinite(y).all()


@every_mixer
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_row_weights_sum_to_one_and_reproduce_the_outputs(case: str, packed: bool, key_heads: int) -> None:
    mixer, heads = mixer_of(case, key_heads), heads_of(70, key_heads)
    if packed:
        heads = replace(heads, segments_BT=(torch.arange(70) >= 33).long().expand(2, -1))
    try:
        rows = mixer.row_weights(heads)
    except NotImplementedError as error:
        pytest.skip(str(error))
    weight_BHTT = torch.cat([rows(start, min(start + 32, 70)) for start in range(0, 70, 32)], dim=2)
    if mixer.rows == "normalised":
        close(weight_BHTT.sum(-1), torch.ones(2, HEADS, 70, dtype=torch.float64))
    assert not weight_BHTT.triu(1).any()
    if case.startswith("mamba2"):
        return  # its matrix multiplies convolved values, and a gate follows: see test_mamba2.py
    v_BTHV = heads.v_BTGV.repeat_interleave(HEADS // key_heads, dim=2)
    close(torch.einsum("bhij,bjhv->bihv", weight_BHTT, v_BTHV), mixer(heads)[0])


def test_first_tokens_of_packed_documents() -> None:
    sizes = [3, 1, 9, 2, 5]
    positions_BT = torch.cat([torch.arange(size) for size in sizes]).expand(2, -1)
    x = torch.randn(2, 20, 3, 2, dtype=torch.float64, requires_grad=True)
    found = first_tokens(x, positions_BT, 4)
    weight, start = torch.randn_like(found), 0
    expected = torch.zeros((), dtype=torch.float64)
    for size in sizes:
        rows = slice(start, start + size)
        for sink in range(4):
            if sink < size:
                assert torch.equal(found[:, rows, sink], x[:, start + sink, None].expand(-1, size, -1, -1))
                expected = expected + (weight[:, rows, sink].clone() * x[:, start + sink, None]).sum()
            else:
                weight[:, rows, sink] = 0  # no such token: no query sees it
        start += size
    close(*(torch.autograd.grad(y, x)[0] for y in ((found * weight).sum(), expected)))


@every_mixer
@pytest.mark.parametrize("key_heads", [4, 1])
def test_readings_are_log_decays_and_shares(case: str, key_heads: int) -> None:
    mixer, heads = mixer_of(case, key_heads), heads_of(200, key_heads)
    found = mixer.readings(heads)
    if found.log_gate is not None:
        assert found.log_gate.shape[:2] == (2, 200)
        assert (found.log_gate <= 0).all()
    if found.linear_share_BTH is not None:
        known = found.linear_share_BTH[~found.linear_share_BTH.isnan()]
        assert found.linear_share_BTH.shape == (2, 200, HEADS)
        assert ((known >= 0) & (known <= 1)).all()
        mixer.linear_branch = False
        silent = mixer.readings(heads).linear_share_BTH
        assert silent is not None
        assert not silent.nan_to_num().any()


hybrids = pytest.mark.parametrize("case", [case for case, config in CASES.items() if config.window_beside_linear])


@hybrids
def test_silenced_branches_give_nothing(case: str) -> None:
    """Whole, as row weights where there are any, and in two pieces; without the window, what nothing sees is 0."""
    mixer, heads = mixer_of(case), heads_of(90)
    v_BTHV = heads.v_BTGV.repeat_interleave(HEADS // 2, dim=2)
    outputs = {}
    branches: tuple[Branch, ...] = ("linear", "window")
    for branch in branches:
        with silenced([mixer], branch):
            y_BTHV, _ = mixer(heads)
            if mixer.rows != "none":
                close(torch.einsum("bhij,bjhv->bihv", mixer.row_weights(heads)(0, 90), v_BTHV), y_BTHV, 1e-8)
            first, state = mixer(cut(heads, slice(0, 41)))
            close(torch.cat([first, mixer(cut(heads, slice(41, 90)), state)[0]], dim=1), y_BTHV, 1e-8)
        outputs[branch] = y_BTHV
    assert mixer.linear_branch
    assert mixer.window_branch
    config = CASES[case]
    far_only = outputs["window"]
    if config.kind in ("lolcats", "ahn") or (config.kind == "lizard" and not config.model_dump()["published"]):
        assert not far_only[:, : config.window_beside_linear].any()  # no key has left the window
    assert far_only[:, -1].abs().sum() > 0 or config.window_beside_linear >= 90
    if config.kind in ("lolcats", "liger", "ahn"):
        swa = Swa(SwaConfig(window=config.window_beside_linear, sinks=config.model_dump()["sinks"]), shapes())
        close(outputs["linear"], swa(heads)[0], 1e-8)


@every_mixer
def test_builds_without_memory_for_the_plan(case: str) -> None:
    with torch.device("meta"):
        mixer = build_mixer(CASES[case], shapes())
    assert all(parameter.is_meta for parameter in mixer.parameters())
    assert mixer.state_bytes() == build_mixer(CASES[case], shapes()).state_bytes()
    assert len(mixer.state_dict()) == len(list(mixer.parameters()))  # no weight under two names: files cannot share


def test_partial_rope_turns_the_first_channels_only() -> None:
    x, positions = torch.randn(1, 3, 1, 8, dtype=torch.float64), torch.arange(3).double()
    angle_BTR = (positions[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)).repeat(1, 2)[None]
    turned = Rope(angle_BTR.cos(), angle_BTR.sin()).rotate(x)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    for t in range(3):  # channel c is turned together with channel c + R / 2
        for c, speed in enumerate((1.0, 0.1)):
            pair = torch.complex(x[0, t, 0, c], x[0, t, 0, c + 2]) * torch.exp(torch.tensor(1j * speed * t))
            close(turned[0, t, 0, c], pair.real.double(), 1e-6)
            close(turned[0, t, 0, c + 2], pair.imag.double(), 1e-6)


@every_mixer
def test_config_survives_plain_data(case: str) -> None:
    assert mixer_config(CASES[case].model_dump(mode="json")) == CASES[case]


def test_unknown_mixer_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"unknown mixer 'hedgehoc'; did you mean 'hedgehog'\? Known: .*hedgehog"):
        mixer_config({"kind": "hedgehoc"})
