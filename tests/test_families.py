"""One contract for all families: the grafted model is its teacher, and a student sees exactly what its teacher sees.

Shape legend in mixers/base.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import LAYERS, SPECIAL, Exact, ExactConfig, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from linearize.families import FAMILIES
from linearize.mixers import MIXERS, MixerEntry
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.readings import read_layers
from linearize.surgery import graft, plan_surgery

MakeTokens = Callable[..., Tensor]
PADDING, CUT = 20, 50


@pytest.fixture(scope="module", autouse=True)
def exact() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXERS, "exact", MixerEntry(ExactConfig, Exact))
        yield


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


def asked(ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Ways to read the same tokens."""
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    packed = torch.cat([torch.arange(40), torch.arange(ids.shape[1] - 40)]).expand_as(ids)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"plain": {}, "padded": {"attention_mask": mask, "position_ids": places}, "packed": {"position_ids": packed}}


def real(arguments: dict[str, Tensor], ids: Tensor) -> Tensor:
    return arguments.get("attention_mask", torch.ones_like(ids)).bool()


def test_every_family_is_tested() -> None:
    assert SPECIAL.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_teacher_changes_no_bit(family: str, dtype: torch.dtype, make_tokens: MakeTokens) -> None:
    model, ids = tiny_teacher(family), make_tokens(2, 70)
    for parameter in model.parameters():  # as from_pretrained does: model.to(dtype) would round RoPE's frequencies too
        parameter.data = parameter.data.to(dtype)
    original = copy.deepcopy(model)
    grafted = graft(model, plan_surgery(model, HedgehogConfig(), replace_sliding=True))
    with grafted.as_teacher() as teacher:
        for arguments in asked(ids).values():
            assert torch.equal(logits(teacher, ids, **arguments), logits(original, ids, **arguments))
    assert logits(model, ids).dtype == dtype
    assert not torch.equal(logits(model, ids), logits(original, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_softmax_as_its_mixer_is_its_teacher(family: str, make_tokens: MakeTokens) -> None:
    model, ids = tiny_teacher(family), make_tokens(2, 90)
    ways = asked(ids)
    expected = {way: logits(model, ids, **arguments) for way, arguments in ways.items()}
    mask = ways["padded"]["attention_mask"]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    grafted = graft(model, plan_surgery(model, ExactConfig(), replace_sliding=True))
    assert len(grafted.students) == LAYERS
    for way, arguments in ways.items():
        found, seen = logits(model, ids, **arguments), real(arguments, ids)
        torch.testing.assert_close(found[seen], expected[way][seen], rtol=1e-5, atol=1e-5, msg=lambda m, w=way: w + m)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)
    with torch.no_grad():
        start = model(ids[:, :CUT], use_cache=True)
        rest = model(ids[:, CUT:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), expected["plain"], rtol=1e-5, atol=1e-5)
    assert max(layer.recomputed for layer in read_layers(grafted, ids)) < 1e-5
