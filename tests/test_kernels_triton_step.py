"""Decoding steps in one Triton launch against the torch forms in fp64, token by token.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from linearize.mixers import HeadInputs, Rope
from linearize.mixers.base import silenced
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery
from linearize_kernels import (
    Branch,
    FarStep,
    LinearState,
    LocalState,
    NearStep,
    Token,
    hedgehog_attention,
    window_step,
)
from linearize_kernels.backend import standing_for
from linearize_kernels.bound import Bound
from linearize_kernels.hedgehog_attention import Map, triton_step
from linearize_kernels.windowed_linear_attention.naive import naive_window_step
from tests.test_kernels_triton import DEVICE, check, eager_features, naive
from tests.tiny_families import tiny_teacher
from tests.tiny_mixers import cut, heads_of, mixer_of


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Outputs are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that start."""
    names: list[str] = []
    start = Bound.__call__

    def count(self: Bound, *arguments: Any) -> None:
        names.append(self.kernel.fn.__name__)
        start(self, *arguments)

    monkeypatch.setattr(Bound, "__call__", count)
    return names


def tokens(x: Tensor | None, t: int) -> Tensor | None:
    return None if x is None else x[:, t : t + 1]


HEDGEHOG = [  # B, T, H, G, K, F, V, map, bias, gate, other, masked
    (1, 3, 4, 2, 16, 16, 16, "softmax", False, None, False, False),
    (2, 2, 4, 2, 20, 12, 40, "exp", True, "head", True, False),
    (2, 2, 3, 1, 20, 24, 24, "softmax_joint", True, "token", False, True),
    (2, 2, 2, 1, 16, 12, 16, "softmax", True, "token", True, True),
    (1, 1, 2, 2, 16, 8, 72, "exp", False, "head", False, False),
]


@pytest.mark.parametrize("case", HEDGEHOG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hedgehog(
    case: tuple[Any, ...], dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token in one launch; outputs and end state as the definition has them on all tokens at once."""
    batch, length, heads, groups, width, features, values, feature_map, *options = case
    bias, gated, branch, masked = options
    torch.manual_seed(batch + heads)
    if values > 64:
        monkeypatch.setattr(triton_step, "PROGRAMS", 1)  # as where there are many heads
    sizes = ((heads, width), (groups, width), (groups, values))
    q, k, v = (torch.randn(batch, length, *size).to(DEVICE, dtype) for size in sizes)
    weights = [(torch.randn(heads, width, features) * width**-0.5).to(DEVICE) for _ in range(2)]
    biases = [torch.randn(heads, features, device=DEVICE) if bias else None for _ in range(2)]
    gate = -6 * torch.rand(batch, length, 1 if gated == "token" else heads, device=DEVICE) if gated else None
    gate = None if gate is None else gate.expand(-1, -1, heads)
    mask = torch.rand(batch, length, device=DEVICE) > 0.4 if masked else None
    other = (
        torch.randn(batch, length, heads, values).to(DEVICE, dtype),
        torch.rand(batch, length, heads, device=DEVICE),
    )
    start = LinearState(torch.rand(batch, heads, 2 * features, values), torch.rand(batch, heads, 2 * features))
    start = LinearState(*(x.to(DEVICE) for x in start))
    kept = [x.clone() for x in start]

    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    state, found = start, []
    for t in range(length):
        one = Branch(*(x[:, t : t + 1] for x in other)) if branch else None
        heads_t = (x[:, t : t + 1] for x in (q, k, v))
        maps = (Map(weights[0], biases[0]), Map(weights[1], biases[1]))
        y, state = hedgehog_attention(
            *heads_t, *maps, feature_map, tokens(gate, t), state, None, tokens(mask, t), other=one
        )
        found.append(y)
    assert launched == ["hedgehog_step"] * length
    assert found[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))

    results = []
    for how, cast in (("exact", torch.float64), ("eager", dtype)):
        rounded = [x.to(cast) for x in (q, k, v)]
        a, b = (
            eager_features(x, weight, each, feature_map, side)
            for x, weight, each, side in zip(rounded[:2], weights, biases, ("query", "key"), strict=True)
        )
        b = b if mask is None else b * mask[:, :, None, None]
        begin = LinearState(*(x.to(cast) for x in start)) if how == "exact" else start
        beside = Branch(*(x.to(cast) for x in other)) if branch else None
        results.append([x.double() for x in naive(a, b, rounded[2], gate, begin, None, dtype, how, beside)])
    check([*results, [x.double() for x in (torch.cat(found, 1), *state)]], dtype)


def test_one_token_that_is_differentiated_takes_the_other_path(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 16, device=DEVICE) for _ in range(3))
    maps = [Map(torch.randn(2, 16, 16, device=DEVICE).requires_grad_()) for _ in range(2)]
    state = LinearState(torch.rand(1, 2, 32, 16, device=DEVICE), torch.rand(1, 2, 32, device=DEVICE))
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        y, end = hedgehog_attention(q, k, v, *maps, state=state)
        loss = y.square().sum() + end.s_BJFV.square().sum()
        gradients.append(torch.autograd.grad(loss, [m.weight_HKF for m in maps]))
    assert "hedgehog_step" not in launched
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again, _ = hedgehog_attention(q, k, v, *maps, state=state)
    assert launched[-1] == "hedgehog_step"
    torch.testing.assert_close(again, y.detach(), rtol=1e-5, atol=1e-5)


WINDOWS = [  # H, G, K, V, window, sinks, metas, F, map, gate, near rotated, far, left, separate, weighted, masked
    (2, 1, 16, 16, 3, 2, 0, 0, "none", False, True, None, False, False, False, True),
    (2, 2, 20, 40, 5, 0, 3, 0, "none", False, False, None, False, False, False, False),
    (4, 2, 16, 24, 4, 2, 2, 12, "softmax", True, True, False, True, False, True, True),
    (3, 1, 20, 16, 5, 0, 0, 16, "softmax_joint", False, True, True, True, False, True, False),
    (2, 2, 16, 16, 1, 3, 0, 8, "exp", False, True, True, True, False, False, False),
    (2, 1, 16, 16, 3, 0, 2, 16, "softmax", True, False, False, False, True, True, True),
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window(
    case: tuple[Any, ...], dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at their start, just before sinks and window are full, and long after; each token in one launch."""
    heads, groups, width, values, window, sinks, metas, features, form, gated, near, far, left, separate, *rest = case
    weighted, masked = rest
    torch.manual_seed(window)
    length, batch = 2, 3

    def new(*sizes: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes).to(DEVICE, of)

    row = [
        new(length, batch, 1, count, size, of=dtype)
        for count, size in ((heads, width), (groups, width), (groups, values))
    ]
    angle_T = (torch.rand(length, batch, 1, width - 4) * 6).to(DEVICE)
    masks = (torch.rand(length, batch, 1) > 0.4).to(DEVICE) if masked else [None] * length
    gates = 3 * new(length, batch, 1, 1)
    seen = torch.tensor([0, window + sinks - 1, 1000], device=DEVICE)
    kept = [
        (window, width),
        (window, values),
        (sinks, width),
        (sinks, values),
        (window if near and far is False else 0, width),
    ]
    tails = [new(batch, count, groups, size, of=dtype) for count, size in kept]
    meta = new(heads, metas) if metas else None
    maps = [Map(new(heads, width, features) * width**-0.5) for _ in range(2)]
    sums = LinearState(new(batch, heads, 2 * features, values), new(batch, heads, 2 * features).abs())
    weights = (new(heads).sigmoid() if near else None, new(heads).exp()) if weighted else (None, None)
    results = []
    for how, cast in (("exact", torch.float64), ("eager", dtype), ("triton", dtype)):
        other = torch.float64 if how == "exact" else torch.float32
        state: list[Any] = [LocalState(seen, *(x.to(cast) for x in tails)), LinearState(*(x.to(other) for x in sums))]
        own = tuple(None if x is None else x.to(other) for x in weights)
        found = []
        for t in range(length):
            cos, sin = angle_T[t].cos().to(other), angle_T[t].sin().to(other)
            token = Token(*(x[t].to(cast) for x in row), cos, sin, masks[t])
            one = NearStep(state[0], 0.3, near, None if meta is None else meta.to(other))
            gate = gates[t].to(other).expand(-1, -1, heads) if gated else None
            beyond = None
            if far is not None:
                beyond = FarStep(*(Map(m.weight_HKF.to(other)) for m in maps), state[1], form, gate, far, left)
            if how == "triton":
                monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
                (y, den), *state = window_step(token, one, beyond, own, separate=separate)
            else:
                monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
                y, den, *state = naive_window_step(token, one, beyond, own, separate=separate)
            found += [y.double(), den.double()]
        results.append([*found, *(x.double() for x in (*state[0], *(state[1] or ())) if x.numel())])
        if how == "triton":
            assert y.dtype == dtype
            assert state[0].k_BWGK.dtype == dtype
    assert launched == ["window_step"] * length
    check(results, dtype)


MIXERS = (
    "lizard-small", "lizard-published-small", "lolcats-small", "swa-small", "ahn-small", "ahn-published-small",
    "hedgehog-bias",
)  # fmt: skip
STEP = {"hedgehog-bias": ["hedgehog_step"]} | {
    case: ["window_step", "step_kernel"] for case in ("ahn-small", "ahn-published-small")
}
"""Kernels of a step, where it is not one of the window."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", MIXERS)
def test_mixers_token_by_token(case: str, masked: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the whole in fp64, or with padding as the same tokens in torch; past the moment when window and sinks fill."""
    length, start, batch = 12, 6, 2 if masked else 1
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(4)) > 0.3
    results = []
    for how, dtype in (("exact", torch.float64), ("eager", torch.float32), ("triton", torch.float32)):
        monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
        mixer, heads = mixer_of(case, dtype=dtype).to(DEVICE), heads_of(length, dtype=dtype, batch=batch)
        heads = replace(heads, mask_BT=mask if masked else None)
        with torch.no_grad():
            if how != "triton" and not masked:
                y, end = mixer(moved(heads))
                results.append([y[:, start:].double(), *(x.double() for x in end)])
                continue
            _, end = mixer(moved(cut(heads, slice(start))))
            monkeypatch.setenv("LINEARIZE_BACKEND", "triton" if how == "triton" else "torch")
            found = []
            for t in range(start, length):
                y, end = mixer(moved(cut(heads, slice(t, t + 1))), end)
                assert torch.isfinite(y).all()
                found.append(y * heads.mask_BT[:, t, None, None, None].to(DEVICE) if masked else y)
        results.append([torch.cat(found, 1).double(), *(x.double() for x in end)])
    assert launched == STEP.get(case, ["window_step"]) * (length - start)
    check([[x for x in found if x.numel()] for found in results], torch.float32)


@pytest.mark.parametrize("branch", ["linear", "window"])
@pytest.mark.parametrize(
    "case", ["lizard-small", "lizard-published-small", "lolcats-small", "ahn-small", "ahn-published-small"]
)
def test_a_silenced_branch_is_silent(
    case: str, branch: Any, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, heads = mixer_of(case, dtype=torch.float32).to(DEVICE), moved(heads_of(13, dtype=torch.float32, batch=1))
    found = []
    with torch.no_grad(), silenced([mixer], branch):
        for backend in ("torch", "triton"):
            monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
            _, state = mixer(cut(heads, slice(12)))
            monkeypatch.setenv("LINEARIZE_BACKEND", backend)
            found.append(mixer(cut(heads, slice(12, 13)), state)[0])
    assert launched == STEP.get(case, ["window_step"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def moved(heads: HeadInputs) -> HeadInputs:
    """On the tests' device."""
    assert heads.rope is not None
    tensors = {name: x.to(DEVICE) for name, x in vars(heads).items() if isinstance(x, Tensor)}
    return replace(heads, **tensors, rope=Rope(heads.rope.cos_BTR.to(DEVICE), heads.rope.sin_BTR.to(DEVICE)))


@pytest.mark.parametrize("case", ["lizard-small", "swa-small"])
def test_one_token_of_a_mixer_can_be_differentiated(
    case: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    mixer, heads = mixer_of(case, dtype=torch.float32).to(DEVICE), moved(heads_of(4, dtype=torch.float32, batch=1))
    with torch.no_grad():
        _, state = mixer(cut(heads, slice(3)))
    one = cut(heads, slice(3, 4))
    launched.clear()
    y, _ = mixer(replace(one, q_BTHK=one.q_BTHK.requires_grad_()), state)
    assert "window_step" not in launched
    (gradient,) = torch.autograd.grad(y.square().sum(), one.q_BTHK)
    assert (gradient != 0).any()
    with torch.no_grad():
        again, _ = mixer(one, state)
    assert launched[-1] == "window_step"
    torch.testing.assert_close(again, y.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", MIXERS)
def test_nothing_waits_for_the_device(case: str) -> None:
    """Tensors without numbers go through a step: nothing asks for one, so a CUDA graph can hold it; shapes stay."""
    mixer, heads = mixer_of(case, dtype=torch.float32), heads_of(2, dtype=torch.float32)
    with torch.no_grad():
        _, state = mixer(heads)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, standing_for("cuda"):
            fake = [mode.from_tensor(x) for x in state]
            y, after = mixer(cut(heads, slice(1)), tuple(fake))
    assert y.shape == (*heads.q_BTHK[:, :1].shape[:3], heads.v_BTGV.shape[-1])
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in state]


@pytest.mark.parametrize(("recipe", "step"), [("lizard", "window_step"), ("hedgehog", "hedgehog_step")])
def test_a_padded_batch_whose_rows_are_chosen_anew(
    recipe: str, step: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams of a whole student in one launch a layer: rows shorter than, as long as and longer than the window."""
    teacher = tiny_teacher("llama", num_hidden_layers=1)
    torch.manual_seed(1)
    mixer = load_recipe(recipe, ["mixer.window=3"] if recipe == "lizard" else []).mixer
    model = graft(teacher, plan_surgery(teacher, mixer)).model.to(DEVICE).eval()
    ids_BT = torch.randint(2, 90, (3, 6), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask_BT = (torch.arange(6) >= torch.tensor([[5], [3], [0]])).long().to(DEVICE)
    chosen = (torch.tensor([2, 0, 0, 1]), torch.tensor([3, 1, 1, 0]), torch.tensor([1, 2]))
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
        with torch.no_grad():
            cache = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
            monkeypatch.setenv("LINEARIZE_BACKEND", backend)
            mask, logits = mask_BT, []
            for number, rows in enumerate(chosen):
                cache.reorder_cache(rows.to(DEVICE))
                mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], 1)
                place_B1 = mask.sum(1, keepdim=True) - 1
                token_B1 = torch.full((len(rows), 1), 7 + number, device=DEVICE)
                logits.append(
                    model(
                        input_ids=token_B1, attention_mask=mask, position_ids=place_B1, past_key_values=cache
                    ).logits.flatten()
                )
        found.append(torch.cat(logits))
    assert launched.count(step) == len(chosen)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
