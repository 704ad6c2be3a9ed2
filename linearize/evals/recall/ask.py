"""Put a recall task to a model.

All prompts of one length have exactly as many tokens, so that batches need no padding: one prefill, then greedy steps
through the model's own cache. Shape legend: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.config import Config
from linearize.endings import ends_of, until_end
from linearize.evals.perplexity import eval_mode, head_of
from linearize.evals.recall.base import Desk, Example, RecallTask, Reply, Split
from linearize.evals.recall.table import TASKS

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 65_536}
"""Prompt tokens in a batch, at least one prompt."""

MORE = 8
"""Tokens generated beyond the longest right answer: a model may say a few words first."""

MARKING = 2
"""Of what a reply is and when it is right; raise it where that changes, and cells of before are measured again."""


class Questions(Config):
    """Which questions: `samples` at each of `depths` depths from 0 to 1; a task without depth gets as many in all."""

    length: int
    depths: int = 5
    samples: int = 10
    seed: int = 0


class Answered(Config):
    """What was answered at one depth (None: the task has none). MQAR counts its queries, the others their examples."""

    depth: float | None
    count: int
    correct: int


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, questions: Questions, prose: Sequence[str]
) -> list[Answered]:
    """Accuracy by depth of greedy answers.

    Args:
        model: a causal language model; lengths beyond its positions are not refused.
        tokenizer: the teacher's.
        name: a key of TASKS.
        questions: length, depths, samples and seed.
        prose: sentences for haystacks of prose.

    Raises:
        DataError: the length is too short for the task.
    """
    task = TASKS[name]
    desk = Desk(tokenizer, questions.length, "test", prose)
    rows = max(1, TOKENS_AT_ONCE[model.device.type] // questions.length)
    by_depth = {
        depth: _examples(task, desk, f"{name} {questions.seed}", depth or 0.0, count)
        for depth, count in _depths(task, questions)
    }
    examples = [(depth, example) for depth, some in by_depth.items() for example in some]
    marks: dict[float | None, list[bool]] = {depth: [] for depth in by_depth}
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(examples), rows):  # of all depths: a step takes as long for many as for few
            depths, batch = zip(*examples[start : start + rows], strict=True)
            for depth, found in zip(depths, _marks(model, tokenizer, task, batch), strict=True):
                marks[depth] += found
    return [Answered(depth=depth, count=len(found), correct=sum(found)) for depth, found in marks.items()]


def check_questions(
    tokenizer: PreTrainedTokenizerBase, names: Iterable[str], questions: Questions, prose: Sequence[str]
) -> None:
    """Write the first question of each task, before a model is asked any.

    Raises:
        DataError: the length is too short for a task.
    """
    desk = Desk(tokenizer, questions.length, "test", prose)
    for name in names:
        depth, _ = _depths(TASKS[name], questions)[0]
        _examples(TASKS[name], desk, f"{name} {questions.seed}", depth or 0.0, 1)


def _depths(task: RecallTask, questions: Questions) -> list[tuple[float | None, int]]:
    if not task.has_depth:
        return [(None, questions.depths * questions.samples)]
    last = max(1, questions.depths - 1)
    return [(index / last if questions.depths > 1 else 0.5, questions.samples) for index in range(questions.depths)]


def _examples(task: RecallTask, desk: Desk, seed: str, depth: float, count: int) -> list[Example]:
    """The n-th example depends on nothing but seed, split, length, depth and n."""
    places = (f"{seed} {desk.split} {desk.length} {depth:.4f} {index}" for index in range(count))
    return [task.write(desk, random.Random(place), depth) for place in places]


def _marks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: RecallTask, examples: Sequence[Example]
) -> list[list[bool]]:
    """Right or wrong, for each answer of each example; whichever examples are asked together."""
    input_ids_BT = torch.tensor([example.input_ids for example in examples], device=model.device)
    if task.correct is None:
        return _read_off(model, input_ids_BT, examples)
    counts = [min(task.answer_tokens, len(example.answer_ids) + MORE) for example in examples]
    replies = greedy(model, input_ids_BT, max(counts)).tolist()
    ends = ends_of(model, tokenizer)
    replies = [until_end(ids[:count], ends)[0] for ids, count in zip(replies, counts, strict=True)]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    return [
        [task.correct(Reply(tuple(ids), text), example)]
        for ids, text, example in zip(replies, texts, examples, strict=True)
    ]


def _read_off(model: PreTrainedModel, input_ids_BT: Tensor, examples: Sequence[Example]) -> list[list[bool]]:
    """Whether the likeliest next token at each query is its value: one forward, and the head at the queries alone."""
    hidden_BTD = model.base_model(input_ids_BT, use_cache=False).last_hidden_state
    head = head_of(model)
    marks = []
    for hidden_TD, example in zip(hidden_BTD, examples, strict=True):
        places, values = zip(*example.queries, strict=True)
        likeliest = head(hidden_TD[list(places)]).argmax(-1).tolist()
        marks.append([token == value for token, value in zip(likeliest, values, strict=True)])
    return marks


def greedy(model: PreTrainedModel, input_ids_BT: Tensor, count: int) -> Tensor:
    """The `count` tokens [B, count] that follow, each the likeliest one."""
    output = model(input_ids=input_ids_BT, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < count:
        output = model(input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


def training_rows(
    tokenizer: PreTrainedTokenizerBase, name: str, questions: Questions, prose: Sequence[str] = ()
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows to train on, none of which holds a key or a story that `ask` asks for; without end.

    Yields:
        token ids of the prompt and its answer, and which of them are to be predicted: the answer's. For MQAR, whose
        values do not stand in the text, the value follows each query.
    """
    task, split = TASKS[name], "train"
    desk = Desk(tokenizer, questions.length, _TRAIN, prose)
    draw = random.Random(f"{name} {questions.seed} {split} {questions.length}")
    while True:
        example = task.write(desk, draw, draw.random())
        ids = [*example.input_ids, *example.answer_ids]
        target = [False] * len(example.input_ids) + [True] * len(example.answer_ids)
        for place, value in example.queries:
            if place + 1 < len(ids):
                ids[place + 1], target[place + 1] = value, True
        yield ids, target


_TRAIN: Split = "train"
