"""Tasks scored by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), an optional dependency.

Its own tasks need the Hub. Local tasks need nothing: they are given to it as they are, which checks our scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import DataError
from linearize.evals.tasks.rows import LocalTask
from linearize.evals.tasks.score import Scores

ROWS_AT_ONCE = {"cpu": 4, "cuda": 64}
"""Pairs of context and continuation in a batch."""


def check_installed() -> None:
    """Say it before anything is measured.

    Raises:
        DataError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise DataError(
            "tasks of this name are lm-evaluation-harness's, which is not installed",
            place="--tasks",
            remedy="pip install 'linearize[eval]', or score local files with --tasks-dir.",
        )


def run_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None
) -> dict[str, Scores]:
    """A task or a group of tasks of lm-eval, by task.

    Raises:
        DataError: lm-eval is missing, does not know the task or cannot load its data (offline), or the task has no
            accuracy.
    """
    check_installed()
    return _evaluated(model, tokenizer, name, name, limit)


def run_local(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LocalTask) -> Scores:
    """The rows of a local task, scored by lm-eval.

    Raises:
        DataError: lm-eval is missing.
    """
    check_installed()
    return _evaluated(model, tokenizer, _configured(task), task.name, None)[task.name]


def _configured(task: LocalTask) -> dict[str, Any]:
    """lm-eval's description of the task: one context and several choices, or several contexts and one continuation."""
    documents = [
        {
            "contexts": [context for context, _ in document.pairs],
            "choices": [continuation for _, continuation in document.pairs],
            "label": document.label,
        }
        for document in task.documents
    ]
    one_context = all(len({context for context, _ in document.pairs}) == 1 for document in task.documents)
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "target_delimiter": "",
        "output_type": "multiple_choice" if task.choices else "loglikelihood",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": name != "perplexity"}
            for name, aggregation in (
                (("acc", "mean"), ("acc_norm", "mean"))
                if task.choices
                else (("acc", "mean"), ("perplexity", "perplexity"))
            )
        ],
        "metadata": {"version": 1},
    }
    if not task.choices:
        return {**config, "doc_to_text": lambda doc: doc["contexts"][0], "doc_to_target": lambda doc: doc["choices"][0]}
    if one_context:
        return {
            **config,
            "doc_to_text": lambda doc: doc["contexts"][0],
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: doc["label"],
        }
    return {
        **config,
        "doc_to_text": lambda doc: doc["label"],
        "doc_to_choice": lambda doc: doc["contexts"],
        "doc_to_target": lambda doc: doc["choices"][0],
    }


def _evaluated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | dict[str, Any],
    place: str,
    limit: int | None,
) -> dict[str, Scores]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ROWS_AT_ONCE[model.device.type]),
            tasks=[task],
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
    except Exception as error:  # what a task raises that has no data, no network or no such name is up to each task
        raise DataError(
            f"lm-eval cannot run it: {' '.join(str(error).split())[:300] or type(error).__name__}",
            place=f"task {place}",
            remedy="Its data come from the Hub: check the name and the network, or score local files with --tasks-dir.",
        ) from error
    assert found is not None
    return {name: _scores(name, samples) for name, samples in found["samples"].items()}


def _scores(name: str, samples: list[Mapping[str, Any]]) -> Scores:
    if not samples or "acc" not in samples[0]:
        raise DataError("lm-eval gives it no accuracy", place=f"task {name}", remedy="Leave it out.")
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    norm = tuple(bool(sample["acc_norm"]) for sample in samples) if "acc_norm" in samples[0] else None
    counts = [len(sample["resps"]) for sample in samples]
    chance = sum(1 / count for count in counts) / len(counts) if min(counts) > 1 else None
    nll = tuple(-float(sample["perplexity"]) for sample in samples) if "perplexity" in samples[0] else None
    correct = tuple(bool(sample["acc"]) for sample in samples)
    return Scores(correct=correct, correct_norm=norm, nll=nll, chance=chance)
