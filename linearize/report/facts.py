"""What a run's folder tells a report: plain data, and what is missing with the command that would measure it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import RunError
from linearize.evals.records import (
    BRANCHES,
    ROWS,
    DiagnosticRow,
    Made,
    PerplexityRow,
    PositionRow,
    RecallRow,
    SpeedRow,
    TaskRow,
    read_rows,
)
from linearize.metrics import read_metrics
from linearize.run_folder import RunFolder, read_json

KINDS: dict[str, tuple[str, str]] = {
    "perplexity": ("perplexity by length", "linearize eval {path} --text TEXT --lengths 512,1k,2k,4k,8k"),
    "positions": ("perplexity by position", "linearize eval {path} --text TEXT --positions --lengths 4k"),
    "recall": ("recall by length and depth", "linearize eval {path} --recall all --lengths 512,1k,2k,4k"),
    "tasks": ("tasks", "linearize eval {path} --tasks piqa,arc_easy,lambada"),
    "diagnostics": ("diagnostics by layer and head", "linearize eval {path} --diagnostics"),
    "speed": ("speed and memory", "linearize speed {path} --lengths 1k,4k,16k"),
}
"""What evaluations measure, in words, and the command that does."""

PROBE = ("the branch probe", "linearize eval {path} --text TEXT --probe")


@dataclass(frozen=True)
class RunFacts:
    """One run, as far as it has come.

    `facts` is run.json, `results` is metrics.json where the run has ended and what there is of it before; `records` the
    lines of metrics.jsonl; `rows` what evaluations wrote, by kind.
    """

    name: str
    folder: Path
    facts: dict[str, Any]
    recipe: dict[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]
    finished: bool
    perplexity: list[PerplexityRow] = field(default_factory=list)
    positions: list[PositionRow] = field(default_factory=list)
    recall: list[RecallRow] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    diagnostics: list[DiagnosticRow] = field(default_factory=list)
    speed: list[SpeedRow] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def probed(self) -> bool:
        """Whether a branch was switched off and measured."""
        models = {row.model for row in self.perplexity} | {row.model for row in self.recall}
        return not models.isdisjoint(BRANCHES)

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was not measured, and the command for it."""
        wanted = [measure for kind, measure in KINDS.items() if kind not in self.made]
        if "window" in self.recipe.get("mixer", {}) and not self.probed:
            wanted.append(PROBE)
        found = [(what, command.format(path=self.folder)) for what, command in wanted]
        if not self.finished:
            return [("the end of the run", f"{self.facts.get('command', 'linearize convert ...')} --resume"), *found]
        return found


def read_run(path: Path, name: str | None = None) -> RunFacts:
    """Everything that is known of a run.

    Raises:
        RunError: the folder holds no run, or a file of it cannot be read.
    """
    folder = RunFolder(path)
    metrics = read_json(path / "metrics.json")
    facts = metrics or folder.facts()
    if not facts:
        raise RunError(
            "holds neither metrics.json nor run/run.json, so there is nothing to report.",
            place=str(path),
            remedy="Give the --out folder of `linearize convert`.",
        )
    recipe_file, log = path / "recipe.yaml", folder.run / "metrics.jsonl"
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    found = {kind: read for kind in ROWS if (read := read_rows(path, kind)) is not None}
    return RunFacts(
        name=name or path.resolve().name,
        folder=path,
        facts=facts,
        recipe=recipe,
        config=read_json(path / "config.json"),
        results=metrics or _so_far(folder.results()),
        records=read_metrics(log) if log.is_file() else [],
        finished=bool(metrics),
        made={kind: made for kind, (_, made) in found.items()},
        **{kind: rows for kind, (rows, _) in found.items()},  # type: ignore[arg-type]
    )


def read_runs(paths: list[Path]) -> list[RunFacts]:
    """Runs under names that tell them apart: of their folders, with their parents' where those are the same."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        raise RunError("is given twice, or shares its name with another run", place=str(paths[0]))
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _so_far(results: dict[str, Any]) -> dict[str, Any]:
    """results.json of a run that has not ended, in the form of metrics.json."""
    stages = [value for key, value in sorted(results.items()) if key.startswith("stage")]
    found: dict[str, Any] = {"stages": stages}
    if "untrained" in results:
        found["untrained"] = results["untrained"]
    if "teacher" in results:
        found["teacher_perplexity"] = results["teacher"]["perplexity"]
    return found
