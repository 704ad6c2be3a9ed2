"""What the training of a stage is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from linearize.checkpoint import Checkpoint
from linearize.distributed import ALONE, Processes, Split
from linearize.metrics import MetricsLog, Progress


@dataclass(frozen=True)
class FitSettings:
    """How to run a stage; nothing here changes what is learnt, but for rounding: `mixed_precision`, `by_document`.

    Attributes:
        mixed_precision: `bf16` runs the forward under autocast; parameters, gradients and AdamW keep their own dtype.
        save_every_steps: steps between checkpoints; None = by time only.
        save_every_seconds: longest time without a checkpoint; the stage's end saves one in any case.
        keep: how many checkpoints stay.
        save_in_background: training goes on while a thread writes a copy of the weights in host memory.
        evaluate: returns numbers to log as `eval/<name>`. It must leave the model as it found it (train mode too);
            the random states are put back for it.
        eval_every_steps: steps between evaluations; None = at the stage's end only.
        graphs: on a GPU, replay micro-batches from CUDA graphs; only where each is the same work (`graphs.obstacle`).
        by_document: softmax layers are told where documents start, and get no mask: inside `softmax_by_document`.
        profile: folder for a trace of a few steps, and a table of where their time goes; None = no profile.
    """

    mixed_precision: Literal["no", "bf16"] = "no"
    save_every_steps: int | None = None
    save_every_seconds: float = 120.0
    keep: int = 2
    save_in_background: bool = True
    evaluate: Callable[[], Mapping[str, float]] | None = None
    eval_every_steps: int | None = None
    graphs: bool = False
    by_document: bool = False
    profile: Path | None = None


@dataclass(frozen=True)
class Run:
    """What the stages of one run share.

    Attributes:
        out: the run's folder.
        stage_index: number of the stage that is being fitted, from 0.
        student: all student parameters by name (mixers, LoRA, and base weights that this stage or an earlier one
            trains): what every checkpoint stores, a superset of what the stage trains.
        checkpoint: where to go on from, if it is of this stage; else None, and the caller restores the student from
            the checkpoint of the stage before (`restore_student`).
        metrics, progress: the run's metrics.jsonl, and where progress is shown.
        seed: with the stage's index it gives the stage's random numbers.
        recipe_hash, corpus_fingerprint: a resumed run must have the same ones.
        processes, split: who trains, and how they share the work; only the main process writes.
    """

    out: Path
    stage_index: int
    student: Mapping[str, Tensor]
    checkpoint: Checkpoint | None
    metrics: MetricsLog
    progress: Progress
    seed: int
    recipe_hash: str
    corpus_fingerprint: str
    processes: Processes = ALONE
    split: Split = "data"


@dataclass(frozen=True)
class FitResult:
    """What a stage came to. Tokens and seconds count the whole stage, over interruptions; seconds only its training.

    `metrics` are those of the last step; `peak_memory_bytes` is what CUDA allocated at most, else the process's RSS:
    of the process that took most.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    metrics: Mapping[str, float | None]
    peak_memory_bytes: int
