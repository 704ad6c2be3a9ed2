"""Scores of local tasks: log-probabilities of continuations after their contexts.

Shape legend: B pairs, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.config import Config
from linearize.evals.perplexity import Head, eval_mode, head_of
from linearize.evals.records import TaskRow
from linearize.evals.tasks.rows import LocalTask

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}
"""Tokens in a batch, padding included."""


class Scores(Config):
    """What a model made of a task, document by document.

    Attributes:
        correct: the right continuation has the largest log-probability; without choices: greedy decoding gives it.
        correct_norm: the same per character of the continuation; None without choices.
        nll: of the right continuation, whole, in nats, where there are no choices; else None.
        chance: accuracy of guessing; None without choices.
    """

    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    nll: tuple[float, ...] | None
    chance: float | None


class Likelihood(Config):
    """Of one continuation: its log-probability, and whether each of its tokens is the likeliest one."""

    log_probability: float
    greedy: bool


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LocalTask) -> Scores:
    """Score every document of a task."""
    pairs = [pair for document in task.documents for pair in document.pairs]
    found = iter(likelihoods(model, [encode_pair(tokenizer, *pair) for pair in pairs]))
    correct, correct_norm, nll = [], [], []
    for document in task.documents:
        own = [next(found) for _ in document.pairs]
        raw = [one.log_probability for one in own]
        if not task.choices:
            nll.append(-raw[0])
            correct.append(own[0].greedy)
            continue
        each = [value / len(pair[1]) for value, pair in zip(raw, document.pairs, strict=True)]
        correct.append(raw.index(max(raw)) == document.label)
        correct_norm.append(each.index(max(each)) == document.label)
    return Scores(
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if task.choices else None,
        nll=None if task.choices else tuple(nll),
        chance=task.chance,
    )


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the context's own tokens end.

    The two are tokenised as one text, because a word at the boundary may be one token with its space; spaces that end
    the context count as the continuation's for the same reason.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole: list[int] = tokenizer(context + continuation)["input_ids"]
    count = len(tokenizer(context)["input_ids"])
    return whole[:count], whole[count:]


def likelihoods(model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
    """Of each continuation, in the order given; batches are of like lengths, padded at the right, where no token looks.

    Args:
        model: a causal language model.
        pairs: token ids of context and continuation; neither may be empty.
    """
    found: list[Likelihood | None] = [None] * len(pairs)
    with torch.no_grad(), eval_mode(model):
        head = head_of(model)
        for batch in _batches(pairs, TOKENS_AT_ONCE[model.device.type]):
            for index, one in zip(batch, _batch(model, head, [pairs[index] for index in batch]), strict=True):
                found[index] = one
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def _batches(pairs: Sequence[tuple[list[int], list[int]]], limit: int) -> Iterator[list[int]]:
    """Numbers of pairs, longest first."""
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    start = 0
    while start < len(order):
        longest = sum(map(len, pairs[order[start]]))
        stop = start + max(1, limit // longest)
        yield order[start:stop]
        start = stop


def _batch(model: PreTrainedModel, head: Head, pairs: list[tuple[list[int], list[int]]]) -> list[Likelihood]:
    rows = [torch.tensor([*context, *continuation]) for context, continuation in pairs]
    input_ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    hidden_BTD = model.base_model(input_ids_BT, use_cache=False).last_hidden_state
    results = []
    for hidden_TD, row, (context, continuation) in zip(hidden_BTD, rows, pairs, strict=True):
        assert context
        assert continuation
        logits_TV = head(hidden_TD[len(context) - 1 : len(row) - 1]).float()
        results.append(_likelihood(logits_TV, row[len(context) :].to(logits_TV.device)))
    numbers = torch.stack([torch.stack(result) for result in results]).tolist()  # one wait for the device a batch
    return [Likelihood(log_probability=value, greedy=bool(greedy)) for value, greedy in numbers]


def _likelihood(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    log_probability = -F.cross_entropy(logits_TV, targets_T, reduction="sum")
    return log_probability, (logits_TV.argmax(-1) == targets_T).all().to(log_probability.dtype)


def task_row(model: str, task: str, scores: Scores, scorer: str) -> TaskRow:
    """Accuracies with standard errors; perplexity, of the whole continuation, where there are no choices."""
    accuracy, error = mean_and_error([float(one) for one in scores.correct])
    norm = None if scores.correct_norm is None else mean_and_error([float(one) for one in scores.correct_norm])
    return TaskRow(
        model=model,
        task=task,
        count=len(scores.correct),
        accuracy=accuracy,
        accuracy_error=error,
        accuracy_norm=None if norm is None else norm[0],
        accuracy_norm_error=None if norm is None else norm[1],
        perplexity=None if scores.nll is None else math.exp(sum(scores.nll) / len(scores.nll)),
        chance=scores.chance,
        scorer=scorer,
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (of the sample; 0 for a single value)."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
