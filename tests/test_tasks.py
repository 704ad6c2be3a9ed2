"""Scores of local tasks: the boundary of context and continuation, batches, comparisons, bad files, lm-eval's own."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearize.errors import DataError
from linearize.evals.records import TaskRow
from linearize.evals.tasks import score as module
from linearize.evals.tasks.compare import compared, mcnemar
from linearize.evals.tasks.harness import run_local, run_named
from linearize.evals.tasks.rows import LocalTask, read_tasks
from linearize.evals.tasks.score import Scores, encode_pair, likelihoods, score, task_row


def rows_of(name: str, documents: int, choices: int, *, contexts: bool = False) -> list[dict[str, Any]]:
    """Words of the tiny tokenizer; `contexts`: the choices are in the contexts."""
    draw = torch.Generator().manual_seed(len(name))
    rows = []
    for document in range(documents):
        shared = " ".join(f"w{word}" for word in torch.randint(2, 97, (5,), generator=draw).tolist())
        for index in range(choices):
            own = torch.randint(2, 97, (1 + index % 3,), generator=draw).tolist()
            other = "".join(f" w{word}" for word in own)
            context, continuation = (shared + other, " w9 w8") if contexts else (shared, other)
            label: Any = document % choices if choices > 1 else ["w9"]
            rows.append(
                {"doc_id": document, "idx": index, "context": context, "continuation": continuation, "label": label}
            )
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (
        ("choices", rows_of("choices", 12, 4)),
        ("contexts", rows_of("contexts", 12, 2, contexts=True)),
        ("words", rows_of("words", 12, 1)),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name == "words":
            (tmp_path / f"{name}.jsonl").write_text(text)
        else:
            (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def expected(model: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    greedy = bool((logits.argmax(-1) == target).all())
    return logits.gather(1, target[:, None]).sum().item(), greedy


def test_likelihoods_of_batches_are_those_of_single_pairs(
    make_teacher: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draw = make_teacher(), torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(2, 97, (n,), generator=draw).tolist(), torch.randint(2, 97, (m,), generator=draw).tolist())
        for n, m in ((3, 1), (20, 4), (1, 7), (9, 2), (14, 1))
    ]
    with torch.no_grad():  # one continuation that greedy decoding gives
        best = model(torch.tensor([pairs[4][0]]), use_cache=False).logits[0, -1].argmax().item()
    pairs[4] = (pairs[4][0], [best])
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", {"cpu": 48})
    found = likelihoods(model, pairs)
    for one, pair in zip(found, pairs, strict=True):
        log_probability, greedy = expected(model, *pair)
        assert one.log_probability == pytest.approx(log_probability, abs=1e-4)
        assert one.greedy == greedy
    assert found[4].greedy


def test_the_boundary_belongs_to_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_pair(tokenizer, "w5 w6", " w7 w8") == ([5, 6], [7, 8])
    assert encode_pair(tokenizer, "w5 w6 ", "w7 w8") == ([5, 6], [7, 8])


def test_scores_follow_the_rules(
    folder: Path, make_teacher: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_teacher()
    choices, contexts, words = read_tasks(folder, ["choices", "contexts", "words"], None)
    for task in (choices, contexts):
        scores = score(model, tokenizer, task)
        for index, document in enumerate(task.documents):
            values = [expected(model, *encode_pair(tokenizer, *pair))[0] for pair in document.pairs]
            each = [value / len(pair[1]) for value, pair in zip(values, document.pairs, strict=True)]
            assert scores.correct[index] == (values.index(max(values)) == document.label)
            assert scores.correct_norm is not None
            assert scores.correct_norm[index] == (each.index(max(each)) == document.label)
    row = task_row("teacher", "choices", score(model, tokenizer, choices), "linearize")
    assert (row.count, row.chance, row.perplexity) == (12, 0.25, None)
    p = row.accuracy
    assert row.accuracy_error == pytest.approx(math.sqrt(p * (1 - p) / 11))
    last = task_row("teacher", "words", score(model, tokenizer, words), "linearize")
    values = [expected(model, *encode_pair(tokenizer, *document.pairs[0])) for document in words.documents]
    assert last.perplexity == pytest.approx(math.exp(-sum(value for value, _ in values) / 12), rel=1e-4)
    assert last.accuracy == sum(greedy for _, greedy in values) / 12
    assert (last.chance, last.accuracy_norm) == (None, None)
    assert len(read_tasks(folder, ["choices"], 5)[0].documents) == 5


def test_comparison_with_the_teacher() -> None:
    assert mcnemar([True] * 10, [True] * 10) == 1
    assert mcnemar([True] * 8 + [False], [False] * 8 + [True]) == pytest.approx(2 * 10 / 2**9)

    def row(name: str, accuracy: float, chance: float | None = 0.25) -> TaskRow:
        return TaskRow(model=name, task="t", count=4, accuracy=accuracy, accuracy_error=0, chance=chance)

    found = compared(row("student", 0.5), row("teacher", 0.75), [True] * 2 + [False] * 2, [True] * 3 + [False])
    assert found.recovered == pytest.approx(2 / 3)
    assert found.recovered_above_chance == pytest.approx(0.5)
    assert found.paired_p == 1
    none = compared(row("student", 0.5), row("teacher", 0.2), [True], [False])
    assert none.recovered_above_chance is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"doc_id": 0}\n', "has no idx, context"),
        ("{\n", "cannot be read"),
        ("", "no rows"),
        ('{"doc_id": 0, "idx": 0, "context": "a", "continuation": "b", "label": 3}\n' * 2, "none of 2 choices"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_tasks(tmp_path, None, None)
    with pytest.raises(DataError, match="did you mean 'bad'"):
        read_tasks(tmp_path, ["bat"], None)
    with pytest.raises(DataError, match="no folder"):
        read_tasks(tmp_path / "other", None, None)


@pytest.mark.slow  # importing lm-eval takes as long as ten of the other tests
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is optional")
def test_lm_eval_gives_the_same(
    folder: Path,
    make_teacher: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_teacher()
    task: LocalTask
    for task in read_tasks(folder, None, None):
        ours, theirs = score(model, tokenizer, task), run_local(model, tokenizer, task)
        assert ours.correct == theirs.correct
        assert ours.chance == theirs.chance
        if task.name == "choices":  # lm-eval divides by the length of the context where choices are contexts
            assert ours.correct_norm == theirs.correct_norm
        if ours.nll is not None:
            assert theirs.nll == pytest.approx(ours.nll, abs=1e-3)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="lm-eval cannot run it"):
        run_named(model, tokenizer, "no_such_task", 2)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_that_is_missing_is_said(tokenizer: PreTrainedTokenizerFast, make_teacher: Any) -> None:
    with pytest.raises(DataError, match="not installed"):
        run_named(make_teacher(), tokenizer, "piqa", 2)


def test_scores_are_plain_data() -> None:
    scores = Scores(correct=(True, False), correct_norm=None, nll=(1.0, 2.0), chance=None)
    assert Scores(**json.loads(scores.model_dump_json())) == scores
