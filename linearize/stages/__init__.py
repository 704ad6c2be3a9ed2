"""Training stages. One file each; this table is the only place that lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from linearize.stages.base import Batch, Stage, StageConfig
from linearize.stages.distil import Distil, DistilConfig
from linearize.stages.transfer import Transfer, TransferConfig
from linearize.surgery import Graft

__all__ = ["STAGES", "Batch", "Stage", "StageConfig", "build_stage"]


class StageEntry(NamedTuple):
    """A stage's configuration class and the class that carries it out."""

    config: type[StageConfig]
    stage: Callable[..., Stage]


STAGES: dict[str, StageEntry] = {
    "transfer": StageEntry(TransferConfig, Transfer),
    "distil": StageEntry(DistilConfig, Distil),
}


def build_stage(config: StageConfig, graft: Graft) -> Stage:
    """The stage that `config` describes, on a grafted model."""
    return STAGES[config.kind].stage(config, graft)
