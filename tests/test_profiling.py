"""Where time goes: the sums, and what a conversion writes."""

from __future__ import annotations

import json

import pytest
import torch

from linearize.profiling import SKIPPED, STEPS, Interval, Launch, profile_table, profiled, read_profile, summarise
from linearize.spans import span


def test_time_and_kernels_go_to_the_innermost_part() -> None:
    steps = [Interval("ProfilerStep#3", 0, 1000), Interval("ProfilerStep#4", 1000, 3000)]
    parts = [
        Interval("teacher", 100, 700),
        Interval("student", 200, 400),
        Interval("backward", 400, 600),  # begins where the other ends, both within the teacher's
        Interval("wait", 1500, 2500),
    ]
    launches = [
        Launch(100, (10.0,)),
        Launch(250, (20.0, 30.0)),
        Launch(500, (40.0,)),
        Launch(650, (50.0,)),
        Launch(2900, (60.0,)),
    ]
    found = {part.part: part for part in summarise(steps, parts, launches)}
    host = {"teacher": 200, "student": 200, "backward": 200, "wait": 1000, "rest": 1400}
    assert {name: part.host_ms for name, part in found.items()} == {n: us / 2000 for n, us in host.items()}
    assert sum(part.host_ms for part in found.values()) * 2 == pytest.approx(3.0)
    assert found["teacher"].device_ms == 60 / 2000
    assert (found["student"].device_ms, found["student"].kernels) == (50 / 2000, 1.0)
    assert found["backward"].device_ms == 40 / 2000
    assert found["rest"].device_ms == 60 / 2000
    assert profile_table("transfer", list(found.values())).row_count == 6


def test_a_few_steps_are_traced(tmp_path) -> None:
    with profiled(tmp_path / "profile", "stage0", torch.device("cpu")) as step_ended:
        for _ in range(SKIPPED + STEPS + 2):
            with span("teacher"):
                x = torch.randn(64, 64)
                with span("student"):
                    x @ x
            step_ended()
    parts = {part.part: part for part in read_profile(tmp_path / "profile", "stage0")}
    assert {"teacher", "student", "rest"} == parts.keys()
    assert all(part.host_ms > 0 and part.kernels == 0 for part in parts.values())
    trace = json.loads((tmp_path / "profile" / "stage0.trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert names.count("linearize: student") == STEPS


def test_too_few_steps_write_nothing_and_no_folder_traces_nothing(tmp_path) -> None:
    with profiled(tmp_path, "stage0", torch.device("cpu")) as step_ended:
        step_ended()
    assert read_profile(tmp_path, "stage0") == []
    with profiled(None, "stage0", torch.device("cpu")) as step_ended:
        step_ended()
