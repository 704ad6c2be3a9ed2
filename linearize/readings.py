"""What student layers do on a short text: their error against the teacher, their gates, their linear branches.

One reading serves the seeding audit (before training) and the monitors (while it goes on). Legend in mixers/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.adapters import lora_off
from linearize.attention import StudentAttention, full_precision, teacher_rows
from linearize.distributed import whole_weights
from linearize.mixers import HeadInputs
from linearize.stages.base import Batch, run_trunk
from linearize.surgery import Graft

TOKENS = 512
"""Read at most: readings are to cost little beside training."""

OPEN, CLOSED = 0.999, 0.001
"""Medians beyond these are warned of: a linear branch that has all or nothing, a gate that keeps all or nothing."""


class Quantiles(NamedTuple):
    """Of all entries of a layer."""

    p1: float
    p50: float
    p99: float


@dataclass(frozen=True)
class LayerReading:
    """One student layer on the teacher layer's input.

    Attributes:
        layer: its number in the model.
        error: |student - teacher|^2 / |teacher|^2 of the mixed values, before the output projection.
        head_errors: the same for each query head.
        recomputed: largest difference between the teacher's own mixed values and softmax attention computed from the
            heads that the student sees, relative to the largest value: how well layout, biases, norms and RoPE of the
            heads are understood.
        log_gate: of the log decay per token; None without a gate.
        linear_share: of the linear branch's share, where it has keys; None without any.
    """

    layer: int
    error: float
    head_errors: tuple[float, ...]
    recomputed: float
    log_gate: Quantiles | None
    linear_share: Quantiles | None

    @property
    def worst_head(self) -> int:
        """The query head with the largest error."""
        return max(range(len(self.head_errors)), key=self.head_errors.__getitem__)


Seen = tuple[StudentAttention, HeadInputs, Tensor]
"""A layer of the observed graft, the heads it saw, and the teacher's mixed values [B, T, H, V] of them."""


@torch.no_grad()
def observe(grafted: Graft, input_ids_BT: Tensor) -> list[Seen]:
    """What every student layer's teacher does on a text [B, T]; the model is left as it was found."""
    place_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    batch = Batch(input_ids_BT, place_BT, None, torch.ones_like(input_ids_BT, dtype=torch.bool))
    seen: list[Seen] = []
    observed = grafted.observed.students.values()
    before = [teacher.observer for teacher in observed]
    try:
        for teacher in observed:
            teacher.observer = lambda *arguments: seen.append(arguments)
        with lora_off(grafted.model), grafted.as_teacher() as model:
            run_trunk(model, batch)
    finally:
        for teacher, observer in zip(observed, before, strict=True):
            teacher.observer = observer
    return seen


@torch.no_grad()
def read_layers(grafted: Graft, input_ids_BT: Tensor) -> list[LayerReading]:
    """Read every student layer on a text of at most TOKENS tokens [B, T]; the model is left as it was found.

    Every layer gets its teacher layer's input, and its own projections (adapters on) make the heads of it.
    """
    input_ids_BT = input_ids_BT[:, :TOKENS].to(grafted.model.device)
    seen = observe(grafted, input_ids_BT)
    mixed = torch.autocast(input_ids_BT.device.type, torch.bfloat16, enabled=bool(grafted.raised))
    with mixed:  # base weights that train are fp32 then
        layers, read = grafted.decoder_layers, []
        for teacher, heads, y_BTHV in seen:
            with whole_weights(layers[teacher.layer_idx]):
                read.append(_read(grafted, teacher, heads, y_BTHV))
        return read


def _read(grafted: Graft, teacher: StudentAttention, heads: HeadInputs, teacher_BTHV: Tensor) -> LayerReading:
    student = grafted.students[teacher.layer_idx]
    grafted.hold(teacher.layer_idx)
    own = student.project(heads)
    student_BTHV, _ = student.mix(own)
    wrong_H = (student_BTHV.float() - teacher_BTHV.float()).square().sum((0, 1, 3))
    size_H = teacher_BTHV.float().square().sum((0, 1, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    with full_precision(teacher_BTHV.device):
        found = student.mixer.readings(own)
        weights = teacher_rows(heads, teacher.shapes)(0, teacher_BTHV.shape[1])
        group = teacher.shapes.query_heads // teacher.shapes.key_heads
        values_BTHV = heads.v_BTGV.float().repeat_interleave(group, dim=2)
        again_BTHV = torch.einsum("bhij,bjhv->bihv", weights, values_BTHV)
    off = (again_BTHV - teacher_BTHV.float()).abs().max() / teacher_BTHV.float().abs().max()
    return LayerReading(
        student.layer_idx,
        float(wrong_H.sum() / size_H.sum()),
        tuple((wrong_H / size_H).tolist()),
        float(off),
        _quantiles(found.log_gate),
        _quantiles(found.linear_share_BTH),
    )


def _quantiles(entries: Tensor | None) -> Quantiles | None:
    """By rank, without NaN; None where nothing is left. torch.quantile refuses more than 16M entries."""
    if entries is None or entries.isnan().all():
        return None
    ordered = entries[~entries.isnan()].float().sort().values
    last = ordered.numel() - 1
    return Quantiles(*(float(ordered[round(last * share)]) for share in (0.01, 0.5, 0.99)))


def as_metrics(layers: Iterable[LayerReading]) -> dict[str, float]:
    """Numbers for metrics.jsonl: `error`, and by layer the worst head and the quantiles."""
    layers = list(layers)
    found = {"error": sum(layer.error for layer in layers) / len(layers)}
    for layer in layers:
        place = f"layer_{layer.layer:02d}"
        found[f"error/{place}"] = layer.error
        found |= {f"error/{place}/head_{head:02d}": error for head, error in enumerate(layer.head_errors)}
        for name, quantiles in (("log_gate", layer.log_gate), ("linear_share", layer.linear_share)):
            if quantiles is not None:
                found |= {f"{name}_{rank}/{place}": value for rank, value in quantiles._asdict().items()}
    return found


class Monitor:
    """Reads the layers of a student in training and warns once of each layer that has gone to an extreme."""

    def __init__(self, grafted: Graft, input_ids_BT: Tensor, warn: Callable[[str], None]) -> None:
        self.grafted, self.input_ids_BT, self.warn = grafted, input_ids_BT, warn
        self._warned: set[tuple[str, int]] = set()

    def __call__(self) -> Mapping[str, float]:
        """The numbers of this moment."""
        layers = read_layers(self.grafted, self.input_ids_BT)
        for text, concerned in warnings_of(layers).items():
            new = [layer for layer in concerned if (text, layer) not in self._warned]
            self._warned |= {(text, layer) for layer in new}
            if new:
                self.warn(f"Layers {', '.join(map(str, new))}: {text}")
        return as_metrics(layers)


def warnings_of(layers: Iterable[LayerReading]) -> dict[str, list[int]]:
    """What to warn of, and the layers it concerns; medians decide."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        share = None if layer.linear_share is None else layer.linear_share.p50
        keep = None if layer.log_gate is None else float(torch.tensor(layer.log_gate.p50).exp())
        for value, low, high in (
            (
                share,
                f"the linear branch has less than {CLOSED} of the weight, so only the window is read; compare with "
                "swa-sink, or start the branch with a larger weight",
                f"the linear branch has more than {OPEN} of the weight, so the window is not read; start the branch "
                "with a smaller weight, or train it at a lower rate",
            ),
            (
                keep,
                f"the gate keeps less than {CLOSED} a token, so the past is forgotten at once; start with longer "
                "half-lives, or train the gate at a lower rate",
                f"the gate keeps more than {OPEN} a token (a half-life above 693 tokens), so little is forgotten; "
                "measure beyond the training length with linearize eval --lengths",
            ),
        ):
            if value is not None and not CLOSED <= value <= OPEN:
                found.setdefault(low if value < CLOSED else high, []).append(layer.layer)
    return found
