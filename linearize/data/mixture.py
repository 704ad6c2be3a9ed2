"""Several sources with weights: from a recipe's `data:` list, or from repeated `--data a.parquet=0.7`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from linearize.config import Config, Number
from linearize.data.sources import Documents, check_documents, default_documents, open_documents
from linearize.errors import DataError


class SourceConfig(Config):
    """One entry of a recipe's `data:` list."""

    source: str = Field(min_length=1, description="a file, a folder or a Hub data set")
    weight: Number = Field(1.0, gt=0, description="share of the training tokens, relative to the others'")
    text_field: str | None = Field(None, description="the column of the text or of the conversations")


@dataclass(frozen=True)
class Source:
    """Documents, and how large a share of the training tokens they give."""

    documents: Documents
    weight: float = 1.0


RecipeData = str | tuple[SourceConfig, ...] | None


def choose_sources(
    data: str | Sequence[str] | None, text_field: str | None, recipe_data: RecipeData
) -> tuple[tuple[Source, ...], str]:
    """What to train on, and one sentence that says so.

    Args:
        data: what the user names, each as `SOURCE` or `SOURCE=WEIGHT`; None or empty takes the recipe's.
        text_field: the column of the text, in all of `data`.
        recipe_data: a Hub data set, for which Python's own documentation stands in when it is out of reach; or a list,
            of which every source must be there.

    Raises:
        DataError: a source is not there, is named twice, or has a weight that is no positive number.
    """
    configs = _named_sources(data, text_field, recipe_data)
    if isinstance(configs, str) or configs is None:
        documents, said = default_documents(configs)
        return (Source(documents),), said
    sources = tuple(Source(open_documents(config.source, config.text_field), config.weight) for config in configs)
    return sources, f"Training text: {name_of(sources)}."


def check_sources(data: str | Sequence[str] | None, text_field: str | None, recipe_data: RecipeData) -> None:
    """What `choose_sources` would refuse of local text, and faults of its first documents, before anything is loaded.

    Raises:
        DataError: naming the source.
    """
    configs = _named_sources(data, text_field, recipe_data)
    for config in configs if isinstance(configs, tuple) else ():
        check_documents(config.source, config.text_field)


def _named_sources(data: str | Sequence[str] | None, text_field: str | None, recipe_data: RecipeData) -> RecipeData:
    """The sources of which every one must be there; else the recipe's data set."""
    if data:
        named = [data] if isinstance(data, str) else list(data)
        configs = tuple(_parse_source(text, text_field) for text in named)
    elif isinstance(recipe_data, tuple):
        configs = recipe_data
    else:
        return recipe_data
    names = [config.source for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError("is given twice.", place=twice[0], remedy="Give it once, with the sum of the weights.")
    return configs


def name_of(sources: Sequence[Source]) -> str:
    """The sources' names, with their shares when there are several."""
    if len(sources) == 1:
        return sources[0].documents.name
    return ", ".join(
        f"{source.documents.name} ({share:.3g} of the tokens)"
        for source, share in zip(sources, shares(sources), strict=True)
    )


def shares(sources: Sequence[Source]) -> list[float]:
    """Weights that sum to 1."""
    total = math.fsum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def _parse_source(text: str, text_field: str | None) -> SourceConfig:
    """`SOURCE=WEIGHT`; an existing path wins, should its name hold an equals sign."""
    if not text:
        raise DataError("is empty.", place="--data", remedy="Give a file, a folder or a Hub data set (owner/name).")
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return SourceConfig(source=text, weight=1.0, text_field=text_field)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (name and 0 < value < math.inf):
        raise DataError(
            f"'{weight}' is not a positive weight.", place=f"--data {text}", remedy="Example: --data notes.jsonl=0.3"
        )
    return SourceConfig(source=name, weight=value, text_field=text_field)
