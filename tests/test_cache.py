"""Decoding through a cache equals reading the whole, in every way transformers uses a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from linearize.cache import StudentCacheLayer
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.modeling import STUDENT_CLASSES, student_config
from linearize.surgery import EveryNth, Graft, KeepSoftmax, graft, plan_surgery

MIXER = HedgehogConfig()
KEEP: dict[str, KeepSoftmax] = {
    "all_students": "none",
    "first_softmax": (0,),
    "middle_softmax": (1,),
    "last_softmax": (2,),
    "every_second": EveryNth(every=2),
}
MAKERS: dict[str, Callable[[PreTrainedModel], Cache | None]] = {
    "made_by_the_model": lambda model: None,
    "with_config": lambda model: DynamicCache(config=model.config),
    "without_config": lambda model: DynamicCache(),
}

every_kind = pytest.mark.parametrize("keep", KEEP)


@pytest.fixture(scope="module")
def students(make_teacher: Callable[..., PreTrainedModel]) -> dict[str, Graft]:
    grafts = {}
    for name, keep in KEEP.items():
        model = make_teacher()
        grafts[name] = graft(model, plan_surgery(model, MIXER, keep))
    return grafts


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, **arguments: Any) -> tuple[Tensor, Cache]:
    output = model(ids, past_key_values=cache, use_cache=True, **arguments)
    return output.logits, output.past_key_values


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("sizes", [[1] * 20, [66, 1, 1, 2], [63, 7], [3, 64, 3]])
def test_in_pieces_equals_whole(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str, maker: str, sizes: list[int]
) -> None:
    model, ids = students[keep].model, make_tokens(2, sum(sizes))
    cache, found = MAKERS[maker](model), []
    for piece in ids.split(sizes, dim=1):
        logits, cache = read(model, piece, cache)
        found.append(logits)
    close(torch.cat(found, 1), whole(model, ids))
    assert cache is not None
    assert cache.get_seq_length() == ids.shape[1]
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, StudentCacheLayer) == (index in students[keep].students)
        assert layer.get_seq_length() == ids.shape[1]


@every_kind
def test_a_student_class_decodes_like_the_graft(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str
) -> None:
    """Its config has other layer_types, so its caches begin with other layers."""
    grafted, ids = students[keep], make_tokens(2, 30)
    config = student_config(grafted.model.config, MIXER, tuple(sorted(grafted.students)))
    student = STUDENT_CLASSES["llama"][1](config).eval()
    student.load_state_dict(grafted.model.state_dict())
    for maker in MAKERS.values():
        start, cache = read(student, ids[:, :20], maker(student))
        end, _ = read(student, ids[:, 20:], cache)
        close(torch.cat([start, end], 1), whole(grafted.model, ids))
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(ids, **asked), grafted.model.generate(ids, **asked))


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_recomputing_everything(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str, beams: int
) -> None:
    model, ids = students[keep].model, make_tokens(2, 12)
    asked = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    assert torch.equal(model.generate(ids, use_cache=True, **asked), model.generate(ids, use_cache=False, **asked))


@every_kind
def test_left_padded_batch_generates_what_each_row_alone_does(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str
) -> None:
    model, lengths = students[keep].model, [9, 20, 1, 70]
    ids, mask = torch.zeros(4, 70, dtype=torch.long), torch.zeros(4, 70, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 70 - length :] = make_tokens(length, seed=row)
        mask[row, 70 - length :] = 1
    asked = {"max_new_tokens": 7, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **asked)
    for row, length in enumerate(lengths):
        ones = mask[:1, -1:].expand(1, length)
        alone = model.generate(ids[row : row + 1, 70 - length :], attention_mask=ones, **asked)
        assert torch.equal(batch[row, 70:], alone[0, length:])


@every_kind
def test_left_padded_logits_equal_unpadded(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str
) -> None:
    model, ids = students[keep].model, make_tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = whole(model, ids, attention_mask=mask, position_ids=positions)
    close(found[:1, 13:], whole(model, ids[:1, 13:]))
    close(found[1:], whole(model, ids[1:]))
    start, cache = read(model, ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
    end, _ = read(model, ids[:, 5:], cache, attention_mask=mask, position_ids=positions[:, 5:])
    close(torch.cat([start, end], 1)[0, 13:], found[0, 13:])


def test_a_mask_of_ones_reaches_no_mixer_in_inference(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor]
) -> None:
    grafted, ids = students["all_students"], make_tokens(2, 12)
    seen: list[Tensor | None] = []
    handles = [
        student.mixer.register_forward_pre_hook(lambda _mixer, given: seen.append(given[0].mask_BT))
        for student in grafted.students.values()
    ]
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[0, :5] = 0
    assert torch.equal(whole(grafted.model, ids, attention_mask=ones), whole(grafted.model, ids))
    assert seen == [None] * len(seen)
    whole(grafted.model, ids, attention_mask=padded)
    assert seen[-1] is not None
    assert torch.equal(seen[-1], padded.bool())
    grafted.model(ids, attention_mask=ones, use_cache=False)  # training asks nothing of the host
    assert seen[-1] is not None
    assert seen[-1].all()
    for handle in handles:
        handle.remove()


@every_kind
def test_rows_can_be_repeated_selected_and_reordered(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str
) -> None:
    model, ids, new = students[keep].model, make_tokens(3, 21), make_tokens(6, 5, seed=1)

    def after(change: Callable[[Cache], None], rows: list[int]) -> None:
        _, cache = read(model, ids)
        change(cache)
        found, _ = read(model, new[: len(rows)], cache)
        close(found, whole(model, torch.cat([ids[rows], new[: len(rows)]], 1))[:, 21:])

    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0])  # type: ignore[arg-type]


def test_a_fresh_or_reset_cache_starts_anew(students: dict[str, Graft], make_tokens: Callable[..., Tensor]) -> None:
    model, ids = students["all_students"].model, make_tokens(2, 21)
    first, cache = read(model, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    again, _ = read(model, ids, cache)
    assert torch.equal(first, again)
    cache.batch_repeat_interleave(2)
    cache.reset()
    cache.batch_select_indices(torch.tensor([0]))  # nothing there yet: nothing to select
    assert read(model, ids, cache)[0].equal(first)


def test_a_used_softmax_cache_is_refused(students: dict[str, Graft], make_tokens: Callable[..., Tensor]) -> None:
    grafted, ids = students["middle_softmax"], make_tokens(1, 8)
    with grafted.as_teacher() as teacher:
        _, cache = read(teacher, ids)
    assert type(cache.layers[0]) is DynamicLayer
    with pytest.raises(RuntimeError, match="layer 0 of this cache holds keys and values .* start from an empty cache"):
        read(grafted.model, ids, cache)
    _, cache = read(grafted.model, ids)
    with grafted.as_teacher() as teacher, pytest.raises(RuntimeError, match="keeps a mixer state, not keys and values"):
        read(teacher, ids, cache)


def test_a_used_cache_of_a_student_class_in_teacher_mode_is_refused(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor]
) -> None:
    cache = DynamicCache(config=student_config(students["all_students"].model.config, MIXER, (0, 1, 2)))
    with students["all_students"].as_teacher() as teacher:
        expected, cache = read(teacher, make_tokens(1, 8), cache)
        close(expected, whole(teacher, make_tokens(1, 8)))
    with pytest.raises(RuntimeError, match="holds keys and values"):
        read(students["all_students"].model, make_tokens(1, 8), cache)


@pytest.mark.parametrize("steps", [0, 3])
def test_memory_does_not_grow(students: dict[str, Graft], make_tokens: Callable[..., Tensor], steps: int) -> None:
    model = students["all_students"].model
    sizes = set()
    for length in (1, 64, 65, 400):
        _, cache = read(model, make_tokens(2, length))
        for _ in range(steps):
            _, cache = read(model, make_tokens(2, 1), cache)
        tensors = [tensor for layer in cache.layers for tensor in layer.state]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    plan = plan_surgery(model_of(model), MIXER)
    assert sizes == {2 * sum(swap.state_bytes for swap in plan)}


def model_of(student: PreTrainedModel) -> PreTrainedModel:
    """An ungrafted model of the same sizes, to plan on."""
    return type(student)(student.config)


def test_a_student_layer_cannot_be_rolled_back(students: dict[str, Graft], make_tokens: Callable[..., Tensor]) -> None:
    _, cache = read(students["all_students"].model, make_tokens(1, 8))
    cache.layers[0].crop(0)
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        cache.layers[0].crop(-2)
    assert not cache.layers[0].is_croppable


@every_kind
def test_a_static_cache_is_refused(students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str) -> None:
    """The softmax layers beside student layers would attend to its empty entries."""
    model = students[keep].model
    with pytest.raises(RuntimeError, match="cannot decode with a static cache, and needs none"):
        model.generate(make_tokens(2, 12), max_new_tokens=5, cache_implementation="static", disable_compile=True)
    with pytest.raises(RuntimeError, match="cannot decode with a static cache, and needs none"):
        model.generate(make_tokens(2, 12), max_new_tokens=5, cache_implementation="static")


@pytest.mark.parametrize("keep", ["all_students", "first_softmax"])
def test_a_4d_mask_is_refused(students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str) -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions; .* takes the 2-D padding mask"):
        whole(students[keep].model, make_tokens(1, 8), attention_mask=mask)


@every_kind
def test_packed_positions_separate_documents(
    students: dict[str, Graft], make_tokens: Callable[..., Tensor], keep: str
) -> None:
    model, ids = students[keep].model, make_tokens(2, 90)
    positions = torch.cat([torch.arange(20), torch.arange(1), torch.arange(69)]).expand(2, -1)
    found = whole(model, ids, position_ids=positions)
    close(found, torch.cat([whole(model, part) for part in ids.split([20, 1, 69], dim=1)], 1))
