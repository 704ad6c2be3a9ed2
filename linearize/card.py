"""The model card of an exported student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from linearize.recipe import Recipe
from linearize.stages import StageConfig


@dataclass(frozen=True)
class CardFacts:
    """What a card tells, all of it measured or read, none of it assumed."""

    teacher: str
    teacher_origin: str
    license: str | None
    text: str
    device: str
    seconds: float
    perplexity: Sequence[Mapping[str, Any]]  # rows with source, length, student, teacher, ratio
    versions: Mapping[str, str]
    command: str


def _lengths(stage: StageConfig) -> str:
    """Of its rows, in the order of its schedule."""
    return ", then ".join(f"{piece.length:,}" for piece in stage.pieces())


def model_card(recipe: Recipe, facts: CardFacts) -> str:
    """README.md of the exported folder, with metadata that the Hub reads."""
    metadata = {
        "base_model": facts.teacher,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention", recipe.mixer.kind],
    }
    if facts.license is not None:
        metadata["license"] = facts.license
    rows = "\n".join(
        f"| {row['source']} | {row['length']:,} | {row['teacher']:.2f} | {row['student']:.2f} | {row['ratio']:.2f} |"
        for row in facts.perplexity
        if row["ratio"] is not None
    )
    stages = "\n".join(
        f"- `{stage.kind}`: {stage.tokens:,} tokens of length {_lengths(stage)}" for stage in recipe.stages
    )
    kept = "none" if recipe.keep_softmax == "none" else str(recipe.keep_softmax)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# Linear-attention student of {facts.teacher}

Made with linearize: softmax attention was replaced by `{recipe.mixer.kind}`
({recipe.paper or "no paper"}), recipe `{recipe.name}`; layers kept softmax: {kept}.

Teacher: {facts.teacher_origin}
Training text: {facts.text}

{stages}

Perplexity on held-out text, windows without context before them:

| text | length | teacher | student | ratio |
|---|---|---|---|---|
{rows}

Training took {facts.seconds:,.0f} s on {facts.device}. Beyond the training length a student may fall behind further:
measure with `linearize eval`.

## Use

```python
import linearize  # registers the classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Check it with `linearize doctor path/to/this/folder`.

## Reproduce

```
{facts.command}
```

Versions: {", ".join(f"{name} {number}" for name, number in facts.versions.items())}. The full recipe is `recipe.yaml`,
every number is in `metrics.json`.
"""
