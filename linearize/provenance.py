"""Where a student comes from: the facts that a run begins with, and the pages beside its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import uuid4

from linearize.card import model_card
from linearize.data import Corpus
from linearize.evals.samples import PROMPT
from linearize.job import Conversion
from linearize.machine import Machine, versions
from linearize.measuring import Converted
from linearize.recipe import Recipe
from linearize.report import write_report
from linearize.run_folder import write_json, write_text
from linearize.teacher import Teacher


def asked(job: Conversion, recipe: Recipe) -> dict[str, Any]:
    """What is known of a run before anything is loaded."""
    return {
        "model": job.model,
        "quantize": job.quantize,
        "recipe": recipe.name,
        "recipe_hash": recipe.digest(),
        "settings": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "command": job.command(),
    }


def facts_of(job: Conversion, recipe: Recipe, machine: Machine, teacher: Teacher, corpus: Corpus) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run; goes to run.json and metrics.json."""
    return {
        **asked(job, recipe),
        "teacher": {
            "name": teacher.model.config.name_or_path,
            "origin": teacher.origin,
            "revision": teacher.revision,
            "sha256": teacher.sha256,
            "license": teacher.license,
            "hub": teacher.hub,
            "languages": list(teacher.languages),
            "gated": teacher.gated,
            "attention": teacher.attention,
        },
        "text": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "epochs": corpus.epochs,
            "dataset": hub_data_set(corpus.name),
        },
        "device": machine.name,
        "precision": machine.precision,
        "versions": versions(),
        "id": uuid4().hex[:12],
    }


def hub_data_set(name: str) -> str | None:
    """The Hub id in the name of a corpus (`owner/name` or `owner/name:config`); None for local text."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::[\w.-]+)?", name)
    return None if match is None or Path(name).exists() else match[1]


def document(recipe: Recipe, facts: dict[str, Any], result: Converted) -> Path:
    """Write metrics.json, the model card and the report beside the weights; the report's page.

    Raises:
        RunError: one cannot be written.
    """
    before, after = result.teacher.perplexity, result.student.perplexity
    table = [
        {
            "source": source,
            "length": result.length,
            "teacher": before[source],
            "student": after[source],
            "ratio": after[source] / before[source],
        }
        for source in before
    ]
    metrics = {
        **facts,
        "perplexity": table,
        "untrained": result.untrained,
        "stages": result.stages,
        "samples": {"prompt": PROMPT, "teacher": result.teacher.sample, "student": result.student.sample},
    }
    write_json(result.folder / "metrics.json", metrics)
    write_text(result.folder / "README.md", model_card(recipe, metrics))
    return write_report([result.folder], images=False)
