"""Readings of student layers: the seeding audit, and the monitors of a training run."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from linearize.attention import StudentAttention
from linearize.audit import TOLERANCES, Audit
from linearize.mixers import MIXERS
from linearize.mixers.lizard import LizardConfig
from linearize.mixers.swa import SwaConfig
from linearize.readings import LayerReading, Monitor, Quantiles, as_metrics, read_layers, warnings_of
from linearize.surgery import graft, plan_surgery
from linearize.tables import audit_report


def grafted_with(model, mixer):
    return graft(model, plan_surgery(model, mixer))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("teacher", [{}, {"attention_bias": True}, {"num_key_value_heads": 1}, {"family": "mistral"}])
def test_the_teachers_attention_follows_from_the_heads(kind, teacher, make_teacher, make_tokens):
    mixer = MIXERS[kind].config(**({"features": 8} if kind == "taylor" else {}))
    layers = read_layers(grafted_with(make_teacher(**teacher), mixer), make_tokens(1, 90))
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert all(layer.recomputed < TOLERANCES[torch.float32] for layer in layers)
    assert all(math.isfinite(error) and len(layer.head_errors) == 4 for layer in layers for error in layer.head_errors)


def test_a_window_that_sees_everything_is_the_teacher(make_teacher, make_tokens):
    layers = read_layers(grafted_with(make_teacher(), SwaConfig(window=100)), make_tokens(1, 90))
    assert max(layer.error for layer in layers) < 1e-9
    near = read_layers(grafted_with(make_teacher(), SwaConfig(window=8, sinks=0)), make_tokens(1, 90))
    assert min(layer.error for layer in near) > 0.01


@pytest.mark.parametrize("mistake", ["query heads swapped", "key/value heads interleaved", "scaling", "a norm on q"])
def test_heads_that_are_read_wrongly_are_found(mistake, make_teacher, make_tokens, monkeypatch):
    grafted = grafted_with(make_teacher(), SwaConfig())
    split = StudentAttention._split

    def wrong(self, projections):
        q, k, v = split(self, projections)
        if self.layer_idx != 1:
            return q, k, v
        if mistake == "query heads swapped":
            return q.flip(2), k, v
        if mistake == "key/value heads interleaved":
            return q, k.flip(2), v.flip(2)
        return (2 * q if mistake == "scaling" else q / q.norm(dim=-1, keepdim=True)), k, v

    monkeypatch.setattr(StudentAttention, "_split", wrong)
    layers = read_layers(grafted, make_tokens(1, 60))
    found = Audit("text", 60, tuple(layers), {}, TOLERANCES[torch.float32])
    assert found.misread == [1]
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(audit_report(found))
    assert "Layers 1: the teacher's attention does not follow" in capture.get()


def test_readings_leave_the_model_as_it_was(make_teacher, make_tokens):
    grafted = grafted_with(make_teacher(), LizardConfig(window=8))
    tokens = make_tokens(1, 60)
    before = grafted.model(tokens).logits
    read_layers(grafted, tokens)
    assert all(student.mode == "student" and student.observer is None for student in grafted.students.values())
    assert torch.equal(grafted.model(tokens).logits, before)


def test_gates_and_shares_are_those_of_the_mixer(make_teacher, make_tokens):
    grafted = grafted_with(make_teacher(), LizardConfig(window=8, sinks=2, half_life=(32.0, 32.0)))
    layers = read_layers(grafted, make_tokens(1, 90))
    assert all(layer.log_gate is not None and layer.linear_share is not None for layer in layers)
    assert layers[0].log_gate is not None
    torch.testing.assert_close(
        torch.tensor(layers[0].log_gate), torch.full((3,), math.log(0.5) / 32), rtol=1e-3, atol=0
    )
    assert layers[0].linear_share is not None
    assert 0 < layers[0].linear_share.p1 < layers[0].linear_share.p50 < layers[0].linear_share.p99 < 1
    short = read_layers(grafted, make_tokens(1, 10))
    assert all(layer.linear_share is None for layer in short)  # all keys are in the window or sinks
    for student in grafted.students.values():
        student.mixer.linear_branch = False
    silent = read_layers(grafted, make_tokens(1, 90))
    assert all(layer.linear_share == (0, 0, 0) for layer in silent)


def reading(layer: int, share: float | None = None, keep: float | None = None) -> LayerReading:
    gate = None if keep is None else Quantiles(*[math.log(keep)] * 3)
    return LayerReading(layer, 0.1, (0.1, 0.3), 0.0, gate, None if share is None else Quantiles(0.0, share, 1.0))


def test_extremes_are_warned_of():
    calm = [reading(0, 0.5, 0.99), reading(1), reading(2, 0.002, 0.5)]
    assert warnings_of(calm) == {}
    wild = [reading(3, 0.0005), reading(4, 0.9995), reading(5, 0.5, 0.9995), reading(6, 0.5, 0.0005), reading(7, 0.0)]
    assert sorted(warnings_of(wild).values()) == [[3, 7], [4], [5], [6]]


def test_a_monitor_warns_once(make_teacher, make_tokens):
    grafted, said = grafted_with(make_teacher(), LizardConfig(window=8)), []
    monitor = Monitor(grafted, make_tokens(1, 60), said.append)
    with torch.no_grad():
        grafted.students[2].mixer.gate.bias.fill_(20.0)  # type: ignore[union-attr]
    for _ in range(2):
        numbers = monitor()
    assert [text.split(":")[0] for text in said] == ["Layers 2"]
    assert numbers.keys() >= {"error", "error/layer_00", "error/layer_02/head_03", "log_gate_p50/layer_01"}
    assert numbers == as_metrics(read_layers(grafted, make_tokens(1, 60)))


def test_readings_of_a_hybrid_skip_softmax_layers(make_teacher, make_tokens):
    model = make_teacher()
    grafted = graft(model, plan_surgery(model, SwaConfig(), (1,)))
    assert [layer.layer for layer in read_layers(grafted, make_tokens(1, 30))] == [0, 2]
