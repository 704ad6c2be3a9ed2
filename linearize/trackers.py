"""Trackers, through accelerate's: tensorboard, wandb, trackio. A copy of metrics.jsonl, which stays the record.

They are offline unless the user's environment says otherwise, and hold metrics and the recipe: no command line, no
environment, no source code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from linearize.checkpoint import Checkpoint
from linearize.errors import RunError, unknown_name
from linearize.recipe import Recipe
from linearize.run_folder import RunFolder
from linearize.stages.base import StageConfig

PROJECT = "linearize"

OFFLINE = {"WANDB_MODE": "offline", "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true"}
"""What wandb is told where the environment says nothing: a git remote may hold a token."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker has to know of a run.

    Attributes:
        name, identity: for people, and for going on with the same run.
        folder: where files may go.
        stages: of the recipe; their steps are counted through.
        done: steps of the whole run that are done; more than 0 where it goes on.
    """

    name: str
    identity: str
    folder: Path
    stages: Sequence[StageConfig]
    done: int = 0

    def step(self, stage_index: int, step: int) -> int:
        """The step's number within the whole run."""
        return sum(stage.steps for stage in self.stages[:stage_index]) + step


def _tensorboard(run: TrackedRun) -> GeneralTracker:
    # steps beyond the checkpoint that a killed run has logged are taken again: purge hides them
    return TensorBoardTracker("tensorboard", run.folder, purge_step=run.done + 1 if run.done else None)


def _wandb(run: TrackedRun) -> GeneralTracker:
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    bare = {"x_disable_meta": True}  # the command line, the host and its user
    return WandBTracker(PROJECT, name=run.name, id=run.identity, resume="allow", dir=str(run.folder), settings=bare)


def _trackio(run: TrackedRun) -> GeneralTracker:
    return TrackioTracker(PROJECT, name=f"{run.name}-{run.identity}", resume="allow")


class TrackerEntry(NamedTuple):
    """The package that a tracker needs, and how its run is begun or gone on with."""

    package: str
    build: Callable[[TrackedRun], GeneralTracker]


TRACKERS: dict[str, TrackerEntry] = {
    "tensorboard": TrackerEntry("tensorboard", _tensorboard),
    "wandb": TrackerEntry("wandb", _wandb),
    "trackio": TrackerEntry("trackio", _trackio),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is run.

    Raises:
        RunError: naming it.
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError(unknown_name("tracker", name, TRACKERS), place="--track")
        if find_spec(TRACKERS[name].package) is None:
            raise RunError(
                f"'{name}' is not installed.", place="--track", remedy="Install it: pip install 'linearize[track]'."
            )


def track_run(
    names: Sequence[str], folder: RunFolder, recipe: Recipe, checkpoint: Checkpoint | None
) -> AbstractContextManager[Callable[[Mapping[str, Any]], None]]:
    """`tracking` of the run in a folder, from its start or from a checkpoint; the main process does it."""
    run = TrackedRun(folder.student.name, folder.facts()["id"], folder.run, recipe.stages)
    if checkpoint is not None:
        run = replace(run, done=run.step(checkpoint.state.stage_index, checkpoint.state.step))
    return tracking(names if folder.processes.main else (), run, recipe.model_dump(mode="json"))


@contextmanager
def tracking(
    names: Sequence[str], run: TrackedRun, settings: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that takes a record of metrics.jsonl and hands it to the trackers.

    Args:
        names: of TRACKERS, installed.
        run: what is tracked.
        settings: the recipe, nested; logged when the run begins, not when it goes on.
    """
    PartialState()  # accelerate's trackers ask it who is the main process
    with ExitStack() as ends:
        trackers = []
        for name in names:
            tracker = TRACKERS[name].build(run)
            tracker.start()
            ends.callback(tracker.finish)
            trackers.append(tracker)
            if run.done == 0:
                tracker.store_init_configuration(_flat(settings))

        def log(record: Mapping[str, Any]) -> None:
            place = f"{record['stage']}_{record['name']}"
            numbers = {f"{place}/{key}": value for key, value in record.items() if key not in ("stage", "name", "step")}
            known = {key: value for key, value in numbers.items() if value is not None}
            for tracker in trackers:
                tracker.log(known, step=run.step(record["stage"], record["step"]))

        yield log


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as `stages.0.tokens`; what is no number becomes text."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            value = {str(index): inner for index, inner in enumerate(value)}
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else str(value)
    return found
