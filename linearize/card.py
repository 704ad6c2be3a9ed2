"""The model card of an exported student: metadata that the Hub reads, and a page that people read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from linearize.fingerprint import pinned
from linearize.recipe import Recipe
from linearize.stages import StageConfig

PLACE = "path/to/this/folder"
"""What a card calls the student until it has a name on the Hub."""


_CARD = """---
{metadata}
---

# Linear-attention student of {teacher}

Softmax attention was replaced by `{mixer}` ({paper}), recipe `{recipe}`, with
linearize; layers kept softmax: {kept}. Its decoding state does not grow with the
text.

| | |
|---|---|
| teacher | {origin} |
| teacher's revision | {revision} |
| teacher's file, sha256 | {sha256} |
| teacher's licence | {license} |
| training text | {text} |
| tokens trained | {tokens:,} |
| trained on | {device}, {seconds:,.0f} s, seed {seed} |

{stages}

## Results

Perplexity on held-out text, in windows of the given length without context before them:

| text | length | teacher | student | ratio |
|---|---|---|---|---|
{rows}

## Limits

- Trained at up to {length:,} tokens; beyond that a student may fall behind further: measure with `linearize eval`.
- {tokens:,} tokens do not make up for all that softmax attention can look up. Perplexity rewards the last tokens of a
  text; recall over long contexts has to be measured apart.
- It inherits what its teacher can and cannot do, and its licence.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
prompt = tokenizer("The history of the sea", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

Where linearize is installed, `import linearize` takes the place of `trust_remote_code=True` and brings GPU kernels.
Check it with `linearize doctor {place}`.

## Reproduce

```
{command}
```

{exact}Versions: {versions}. Recipe hash {digest}; the full recipe is `recipe.yaml`, every number is in `metrics.json`.
"""


def _lengths(stage: StageConfig) -> str:
    """Of its rows, in the order of its schedule."""
    return ", then ".join(f"{piece.length:,}" for piece in stage.pieces())


def model_card(recipe: Recipe, metrics: Mapping[str, Any], place: str = PLACE) -> str:
    """README.md of a student, with no folder of this machine.

    Args:
        recipe: what it was made with.
        metrics: what metrics.json holds; all of it measured or read, none of it assumed.
        place: folder or Hub name to load it from.
    """
    teacher = metrics["teacher"]
    stages = [f"- `{stage.kind}`: {stage.tokens:,} tokens of length {_lengths(stage)}" for stage in recipe.stages]
    rows = [
        f"| {row['source']} | {row['length']:,} | {row['teacher']:.2f} | {row['student']:.2f} | {row['ratio']:.2f} |"
        for row in metrics["perplexity"]
        if row["ratio"] is not None
    ]
    versions = metrics["versions"].items()
    card = _CARD.format(
        metadata=metadata(recipe, metrics).to_yaml(),
        teacher=teacher["name"],
        mixer=recipe.mixer.kind,
        paper=_paper(recipe.paper),
        recipe=recipe.name,
        kept="none" if recipe.keep_softmax == "none" else str(recipe.keep_softmax),
        origin=teacher["origin"],
        revision=teacher["revision"] or "none: not from the Hub",
        sha256=teacher["sha256"] or "not one file",
        license=teacher["license"] or "unknown: ask whoever made the teacher",
        text=metrics["text"]["name"],
        tokens=recipe.tokens,
        device=metrics["device"],
        seconds=sum(stage["seconds"] for stage in metrics["stages"]),
        seed=metrics["seed"],
        stages="\n".join(stages),
        rows="\n".join(rows),
        length=max(stage.length for stage in recipe.stages),
        place=place,
        command=metrics["command"],
        exact=_exact(metrics["model"], pinned(metrics["model"], teacher)),
        versions=", ".join(f"{name} {number}" for name, number in versions),
        digest=metrics["recipe_hash"],
    )
    return without_folders(card, paths_said(metrics))


def _exact(model: str, exact: str) -> str:
    """How to ask for the teacher's weights when its name may stand for others."""
    return "" if exact == model else f"`--model {exact}` names these weights of the teacher for good.\n\n"


def paths_said(metrics: Mapping[str, Any]) -> list[str]:
    """The command line of a run, and the sources that its recipe names: all that may hold a local path."""
    data = metrics.get("settings", {}).get("data")
    sources = [entry["source"] for entry in data] if isinstance(data, list) else []
    return [metrics["command"], shlex.join(sources)]


def without_folders(text: str, said: Iterable[str]) -> str:
    """`text`, in which every absolute path that stands in the command lines `said` is its last part alone.

    What is pushed tells nobody how this machine's folders are called.
    """
    words = [word for line in said for word in shlex.split(line)]
    parts = {part for word in words for part in (*word.split("="), *re.split(r"[\s=,\[\]{}]+", word))}
    paths = [path for path in parts if path.startswith(("/", "~/")) and Path(path).name]
    spelt = {form: Path(path).name for path in paths for form in (path, str(Path(path)), str(Path(path).expanduser()))}
    if not spelt:
        return text
    known = "|".join(map(re.escape, sorted(spelt, key=len, reverse=True)))  # what lies in a folder before the folder
    return re.sub(rf"(?<![\w.~/-])(?:{known})(?!\w)", lambda found: spelt[found[0]], text)


def metadata(recipe: Recipe, metrics: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads: base model, licence, tags, data sets, languages, and the perplexities as a model index."""
    teacher, data_set, results = metrics["teacher"], metrics["text"]["dataset"], _results(metrics["perplexity"])
    return ModelCardData(
        base_model=teacher["hub"],
        base_model_relation=None if teacher["hub"] is None else "finetune",
        license=teacher["license"],
        language=list(teacher["languages"]) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linearize", "linear-attention", recipe.mixer.kind],
        datasets=None if data_set is None else [data_set],
        model_name=None if results is None else f"{teacher['name'].rpartition('/')[2]}-{recipe.name}",
        eval_results=results,
    )


def _results(rows: Sequence[Mapping[str, Any]]) -> list[EvalResult] | None:
    """One result a text and length; a model index without results is not valid."""
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["source"],
            dataset_name=f"{row['source']}, windows of {row['length']:,} tokens",
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=round(row["student"], 4),
        )
        for row in rows
    ]
    return found or None


def _paper(arxiv: str) -> str:
    """A link, where the recipe names a paper by its arXiv id."""
    number = re.search(r"\d{4}\.\d{5}", arxiv)
    return arxiv or "no paper" if number is None else f"[arXiv {number[0]}](https://arxiv.org/abs/{number[0]})"
