"""Conversions of a few steps, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

from linearize.job import Conversion
from linearize.metrics import TIMING_FIELDS, read_metrics

SHORT = (
    "stages.0.length=32",
    "stages.1.length=32",
    "stages.0.batch=2",
    "stages.0.micro_batch=1",
    "stages.1.batch=2",
    "stages.1.micro_batch=1",
    "stages.0.tokens=640",
    "stages.1.tokens=640",
    "stages.1.lora.dropout=0.1",
    "heldout_tokens=256",
    "precision=fp32",
)

BASE = (
    "stages.0.train=[mixer, qkv]",
    "stages.0.optimizer.lr=0.001",
    "stages.1.train=[all]",
    "stages.1.lora=null",
    "stages.1.optimizer.lr=0.0001",
)
"""Stages that train base weights, with the frozen teacher that they need."""


def short_conversion(model: Path, text: Path, out: Path, *overrides: str) -> Conversion:
    """40 micro-batches, 20 steps, on the CPU."""
    return Conversion(str(model), out=out, data=str(text), overrides=(*SHORT, *overrides), device="cpu")


def losses(folder: Path) -> list[dict]:
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]
