"""Recall tasks: exact lengths, depth, splits, stories that follow from their facts, and marking."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearize.data import open_documents
from linearize.errors import DataError, RunError
from linearize.evals.recall import TASKS, Questions, ask, find_tasks, sentences_of, training_rows
from linearize.evals.recall.ask import TOKENS_AT_ONCE, _examples, greedy
from linearize.evals.recall.babilong import OBJECTS, ROOMS, STORIES
from linearize.evals.recall.base import Desk, Example, Reply, opening, split_of
from linearize.evals.recall.texts import RecallTexts, recall_texts, write_recall_texts
from linearize.evals.recall.tokens import PAIRS, _slots

PROSE = sentences_of(
    "A river does not carry its water in memory at all, they say here. What arrives at the mouth has passed bends. "
    "At each of them something was kept back by the patient old stones. A lake holds every drop that it was ever given."
)
needle_tasks = pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Every byte is a token, with a token in front of each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


def write(name: str, desk: Desk, depth: float = 0.5, seed: int = 0) -> Example:
    return TASKS[name].write(desk, random.Random(seed), depth)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_the_length_that_was_asked_for(name: str, letters: PreTrainedTokenizerFast) -> None:
    for length in (3000, 3001):
        example = write(name, Desk(letters, length, "test", PROSE))
        missing = length - len(example.input_ids) - TASKS[name].answer_tokens
        assert missing == (0 if name != "mqar" else (length - 1) % 2)  # its slots are pairs of tokens
        assert example.input_ids[0] == 0  # the tokenizer's opening


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name: str, letters: PreTrainedTokenizerFast) -> None:
    desk = Desk(letters, 3000, "test", PROSE)
    first, again = (_examples(TASKS[name], desk, "0", 0.25, 3) for _ in range(2))
    assert first == again
    assert len({example.input_ids for example in first}) == 3
    assert _examples(TASKS[name], desk, "1", 0.25, 3) != first


@needle_tasks
def test_depth_is_where_the_answer_lies(name: str, letters: PreTrainedTokenizerFast) -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        example = write(name, Desk(letters, 6000, "test", PROSE), depth)
        text = letters.decode(example.input_ids)
        assert example.answer in text
        places.append(text.index(example.answer) / len(text))
    assert places[0] < 0.1
    assert 0.4 < places[1] < 0.6
    assert places[2] > 0.85


@pytest.mark.parametrize("name", ["passkey", "niah-1", "niah-3-like"])
def test_splits_are_disjoint(name: str, letters: PreTrainedTokenizerFast) -> None:
    tests = {write(name, Desk(letters, 3000, "test", PROSE), seed=seed).answer for seed in range(20)}
    trained = {write(name, Desk(letters, 3000, "train", PROSE), seed=seed).answer for seed in range(20)}
    assert {split_of(answer) for answer in tests} == {"test"}
    assert {split_of(answer) for answer in trained} == {"train"}


@pytest.mark.parametrize("name", TASKS)
def test_training_rows_end_with_the_answer(name: str, letters: PreTrainedTokenizerFast) -> None:
    for ids, target in itertools.islice(training_rows(letters, name, Questions(length=3000), PROSE), 3):
        assert len(ids) == len(target) <= 3000
        assert any(target)
        if name not in ("mqar", "copy"):
            answer = letters.decode([token for token, wanted in zip(ids, target, strict=True) if wanted])
            assert answer.startswith(" ")
            assert answer.endswith(".")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "mqar"])
def test_training_texts_fill_a_row(name: str, letters: PreTrainedTokenizerFast) -> None:
    wanted = RecallTexts((name, "passkey"), 3000, 10_000, prose=PROSE)
    texts = list(itertools.islice(recall_texts(wanted, letters), 4))
    assert [task for task, _ in texts] == [name, "passkey"] * 2
    assert all(len(letters(text, add_special_tokens=False)["input_ids"]) == 2999 for _, text in texts)
    assert texts == list(itertools.islice(recall_texts(wanted, letters), 4))
    keys = {text[-6:-1] for task, text in texts if task == "passkey"}
    assert {split_of(key) for key in keys} == {"train"}


def test_training_texts_where_seams_are_spelt_otherwise() -> None:
    """A tokenizer that joins what stands at the seams of the pieces: the haystack makes up for it."""
    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    filler = " ".join(PROSE) + " The grass is green.\n The pass key is 12345. What is the pass key? The pass key is"
    backend.train_from_iterator([filler] * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    wanted = RecallTexts(("passkey", "niah-2-like"), 400, 10_000, prose=PROSE)
    for _, text in itertools.islice(recall_texts(wanted, tokenizer), 40):
        assert len(tokenizer(text)["input_ids"]) == 399


def test_training_texts_in_a_file(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    out = tmp_path / "new" / "recall.parquet"
    wanted = RecallTexts(("passkey",), 2000, 5000, prose=PROSE)
    assert write_recall_texts(wanted, letters, out, lambda said: None) == 3
    rows = [content for _, content in open_documents(str(out), None)]
    assert len(rows) == 3
    assert all(str(row).endswith(".") for row in rows)
    with pytest.raises(RunError, match="exists already"):
        write_recall_texts(wanted, letters, out, lambda said: None)
    with pytest.raises(DataError, match=r"Let its name end in \.parquet"):
        write_recall_texts(wanted, letters, tmp_path / "recall.txt", lambda said: None)
    with pytest.raises(DataError, match="mqar"):
        next(recall_texts(RecallTexts(("mqar",), 2000, 5000), letters))


@pytest.mark.parametrize("question", STORIES)
def test_stories_follow_from_their_facts(question: int) -> None:
    """An oracle that reads the facts one by one."""
    for seed in range(150):
        story = STORIES[question](random.Random(seed))
        assert oracle(list(story.facts), story.question) == story.answer, story


def oracle(facts: list[str], question: str) -> str:
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    gifts, lies = [], []
    for fact in facts:
        words = fact.rstrip(".").split()
        who = words[0]
        if found := re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact):
            lies.append(found.groups())
        elif found := re.fullmatch(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.", fact):
            assert holder[found[2]] == found[1]
            holder[found[2]] = found[3]
            gifts.append(found.groups())
        elif words[-1] in ROOMS:
            assert place.get(who) != words[-1]
            place[who] = words[-1]
        else:
            (thing,) = set(words) & set(OBJECTS)
            if re.search(r"dropped|put down|left|discarded", fact):
                assert holder.pop(thing) == who
            else:
                assert thing not in holder
                assert thing not in trail or trail[thing][-1] == place[who]
                holder[thing] = who
        for thing, person in holder.items():
            if trail.setdefault(thing, [place[person]])[-1] != place[person]:
                trail[thing].append(place[person])
    if found := re.fullmatch(r"Where is (\w+)\?", question):
        return place[found[1]]
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return trail[found[1]][-1]
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        rooms = trail[found[1]]
        return rooms[len(rooms) - 1 - rooms[::-1].index(found[2]) - 1]
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return next(left for left, side, right in lies if (side, right) == found.groups())
    if found := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
        return next(right for left, side, right in lies if (left, side) == found.groups())
    patterns = (
        (r"Who gave the (?P<b>\w+) to (?P<c>\w+)\?", 0),
        (r"Who did (?P<a>\w+) give the (?P<b>\w+) to\?", 2),
        (r"What did (?P<a>\w+) give to (?P<c>\w+)\?", 1),
        (r"Who received the (?P<b>\w+)\?", 2),
        (r"Who gave the (?P<b>\w+)\?", 0),
    )
    for pattern, part in patterns:
        if found := re.fullmatch(pattern, question):
            asked = found.groupdict()
            fits = [gift for gift in gifts if all(gift["abc".index(key)] == value for key, value in asked.items())]
            return fits[-1][part]
    raise AssertionError(question)


@pytest.mark.parametrize(
    ("name", "text", "answer", "question", "right"),
    [
        ("passkey", " 12345. It is", "12345", "", True),
        ("passkey", " 123456", "12345", "", False),
        ("passkey", " 7, 12345", "12345", "", False),
        ("niah-3-like", " it is ABC-1.", "abc-1", "", True),
        ("babilong-1-like", " the Kitchen. Not the office", "kitchen", "Where is Mary?", True),
        ("babilong-1-like", " the kitchen or office.", "kitchen", "Where is Mary?", False),
        ("babilong-3-like", " the kitchen before the garden", "kitchen", "Where was the milk before the garden?", True),
        ("babilong-5-like", " Mary\nQuestion: Who? Fred", "Mary", "Who gave the milk to Bill?", True),
    ],
)
def test_marks(name: str, text: str, answer: str, question: str, right: bool) -> None:
    correct = TASKS[name].correct
    assert correct is not None
    assert correct(Reply((), text), Example((), answer, question=question)) is right


def test_queries_of_mqar_are_its_pairs(letters: PreTrainedTokenizerFast) -> None:
    example = write("mqar", Desk(letters, 258))
    ids = example.input_ids
    pairs = dict(zip(ids[1 : 1 + 2 * PAIRS[256] : 2], ids[2 : 2 + 2 * PAIRS[256] : 2], strict=True))
    assert len(pairs) == len(example.queries) == PAIRS[256]
    assert {ids[place]: value for place, value in example.queries} == pairs
    slots = [slot for seed in range(400) for slot in _slots(random.Random(seed), 4, 100)]
    assert sum(slot < 10 for slot in slots) / len(slots) > 0.5  # they crowd at the beginning


def test_asks_every_depth_and_decodes_as_generate_does(
    make_teacher: Callable[..., PreTrainedModel], letters: PreTrainedTokenizerFast
) -> None:
    teacher = make_teacher(vocab_size=300, max_position_embeddings=4096)
    found = ask(teacher, letters, "passkey", Questions(length=600, depths=3, samples=2), PROSE)
    assert [one.depth for one in found] == [0, 0.5, 1]
    assert [one.count for one in found] == [2, 2, 2]
    (queries,) = ask(teacher, letters, "mqar", Questions(length=129, depths=2, samples=3), PROSE)
    assert (queries.depth, queries.count) == (None, 6 * PAIRS[128])
    ids = torch.tensor([write("passkey", Desk(letters, 600), seed=seed).input_ids for seed in range(2)])
    own = teacher.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        torch.testing.assert_close(greedy(teacher, ids, 5), own[:, ids.shape[1] :])


def test_who_is_asked_together_does_not_matter(
    make_teacher: Callable[..., PreTrainedModel], letters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies, one by one and all at once; marks follow from them."""
    teacher = make_teacher(vocab_size=300, max_position_embeddings=4096)
    replies: list[list[Reply]] = []

    def correct(reply: Reply, example: Example) -> bool:
        replies[-1].append(reply)
        return len(reply.text) % 2 == 0

    for name in ("passkey", "copy"):
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], correct=correct))
        answered = []
        for tokens in (1, 10_000):
            monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", tokens)
            replies.append([])
            answered.append(ask(teacher, letters, name, Questions(length=600, depths=3, samples=2), PROSE))
        assert replies[-1] == replies[-2]
        assert answered[0] == answered[1]


@pytest.mark.parametrize("named", ["model", "tokenizer"])
def test_what_follows_an_end_token_is_no_reply(
    make_teacher: Callable[..., PreTrainedModel],
    letters: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
) -> None:
    end = 1
    teacher = make_teacher(vocab_size=300, max_position_embeddings=4096, eos_token_id=end if named == "model" else None)
    tokenizer = deepcopy(letters)  # a shallow one shares its special tokens
    tokenizer.eos_token = "<pad>" if named == "tokenizer" else None
    given: list[tuple[int, ...]] = []

    def reply(model: PreTrainedModel, input_ids_BT: torch.Tensor, count: int) -> torch.Tensor:
        return torch.tensor([(list(ids) + [end] * count)[:count] for ids in given])

    monkeypatch.setattr(sys.modules[ask.__module__], "greedy", reply)
    for name in ("passkey", "copy"):
        desk = Desk(letters, 600, "test", PROSE)
        (right,) = _examples(TASKS[name], desk, f"{name} 0", 0.5, 1)
        (wrong,) = _examples(TASKS[name], desk, f"{name} 1", 0.5, 1)
        answer, other = right.answer_ids, wrong.answer_ids
        for ids, correct in ((answer, 1), ((*answer, end, *other), 1), ((end, *answer), 0), ((*answer[:2], end), 0)):
            given[:] = [ids]
            (found,) = ask(teacher, tokenizer, name, Questions(length=600, depths=1, samples=1), PROSE)
            assert found.correct == correct, (name, ids)


def test_bad_names_and_lengths(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="did you mean 'passkey'"):
        find_tasks(["passkeys"])
    assert find_tasks(["all"]) == TASKS
    with pytest.raises(DataError, match="too few"):
        write("passkey", Desk(letters, 100))
    assert opening(letters) == (0,)
