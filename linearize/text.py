"""What a conversion reads: its training text, the text it is measured on, and what the two share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize.data import Budget, Corpus, choose_sources, heldout_from, load_corpus, scheduled_rows
from linearize.data.overlap import measure_overlap
from linearize.errors import DataError
from linearize.job import Conversion
from linearize.recipe import Recipe
from linearize.train import Batches

POOLED = "held-out"
"""The name of text that was kept aside from the training text, over all its sources."""


@dataclass(frozen=True)
class Heldout:
    """Text that nothing is trained on: int32 tokens by source, read in windows of `length`."""

    tokens: Mapping[str, np.ndarray]
    length: int

    @property
    def first_window(self) -> Tensor:
        """Of the first source: int64 [1, length]."""
        first = next(iter(self.tokens.values()))
        return torch.from_numpy(first[: self.length].astype(np.int64))[None]


def read_text(
    job: Conversion, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[Corpus, dict[str, np.ndarray]]:
    """The corpus, and the tokens by source of a held-out text of its own: none where the job names no such text.

    Raises:
        DataError: a text cannot be read, or is too short for a row of some stage.
    """
    aside = {} if job.heldout is None else heldout_from(job.heldout, job.text_field, tokenizer, recipe.heldout_tokens)
    sources, said = choose_sources(job.data, job.text_field, recipe.data)
    console.print(said, highlight=False, markup=False)
    budget = Budget(recipe.tokens, recipe.heldout_tokens, recipe.seed, recipe.drop_overlap)
    with console.status("Reading and tokenising") as status:
        corpus = load_corpus(
            sources,
            tokenizer,
            budget,
            aside,
            progress=lambda done, total: status.update(f"Tokenising: {done:,} of {total:,}"),
            say=partial(console.print, highlight=False, markup=False),
        )
    for line in corpus.remarks():
        console.print(line, highlight=False, markup=False)
    for index in range(len(recipe.stages)):
        batches_of(corpus, recipe, index)  # refuses too little text now, and not after the teacher was measured
    return corpus, aside


def batches_of(corpus: Corpus, recipe: Recipe, index: int) -> Batches:
    """The part of the corpus that stage number `index` reads; no two stages read the same tokens.

    Raises:
        DataError: there is less text than one row.
    """
    first_token = sum(stage.tokens for stage in recipe.stages[:index])
    return scheduled_rows(corpus, recipe.stages[index], first_token, recipe.seed + index)


def choose_heldout(recipe: Recipe, corpus: Corpus, aside: Mapping[str, np.ndarray]) -> Heldout:
    """What students are measured on: the text aside; without one, what the corpus kept aside, all sources together.

    Raises:
        DataError: when there is no held-out text at all.
    """
    found = aside or {POOLED: np.concatenate([np.empty(0, np.int32), *corpus.heldout.values()])}
    length = min([*(stage.length for stage in recipe.stages), max(tokens.size for tokens in found.values())])
    if length < 2:
        raise DataError(
            "leaves no text aside to measure on", place=corpus.name, remedy="Give more text, or a file with --heldout."
        )
    return Heldout({source: tokens for source, tokens in found.items() if tokens.size >= length}, length)


def say_overlap(
    corpus: Corpus, heldout: Heldout, tokenizer: PreTrainedTokenizerBase, console: Console
) -> dict[str, float]:
    """Share of each held-out source's 13-token runs that stand in the training text; said, and noted in the run."""
    found = measure_overlap(corpus, heldout.tokens, tokenizer)
    for line in found.lines():
        console.print(line, highlight=False, markup=False)
    return {source: share.share for source, share in found.heldout.items()}
