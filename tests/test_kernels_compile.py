"""The Triton kernels compile for an H100 where there is none, and fit its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


CASES = (
    ("hedgehog 64, all options",),
    ("hedgehog 128, by blocks", "hedgehog 128, by blocks, all options"),
    ("exp 80",),
    ("decay per channel 64",),
    ("window 64", "rotary", "convolutions", "distillation loss", "steps"),
    ("delta 64", "ssd 128"),
)


@pytest.mark.parametrize("cases", CASES, ids=" and ".join)
def test_compiles_for_sm_90(cases: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: this one may hold Triton's interpreter."""
    pytest.importorskip("triton")
    chosen = [word for case in cases for word in ("--case", case)]
    command = [sys.executable, str(ROOT / "scripts/compile_kernels.py"), *chosen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    with capfd.disabled():
        print("\n" + done.stdout)  # noqa: T201 - registers and spills, for who reads the log
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
