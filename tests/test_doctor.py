"""What `doctor` finds right in students, and what it finds wrong."""

from __future__ import annotations

import shutil

import pytest
import torch

from linearize.doctor import CHECKS, Patient, difference, examine, examine_folder
from linearize.export import load_student
from linearize.mixers.hedgehog import Hedgehog
from linearize.recipe import load_recipe, recipe_names
from linearize.surgery import graft, plan_surgery
from tests.grafts import as_exported


def test_doctor_is_green_on_the_export(converted):
    findings = examine_folder(converted.folder)
    assert len(findings) == len(CHECKS) + 1
    assert [finding.check for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("kept", ["none", "[0, 1, 2]"])
def test_doctor_is_green_on_all_student_and_all_softmax_models(kept, make_teacher):
    model = make_teacher()
    if kept == "none":
        recipe = load_recipe("hedgehog")
        model = as_exported(graft(model, plan_surgery(model, recipe.mixer)), recipe.mixer)
    assert [finding.check for finding in examine(model) if not finding.passed] == []


@pytest.mark.parametrize("name", recipe_names())
def test_doctor_is_green_on_every_shipped_mixer(name, make_teacher):
    """With parameters moved off their start, where some mistakes cancel."""
    recipe, model = load_recipe(name), make_teacher()
    grafted = graft(model, plan_surgery(model, recipe.mixer))
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    failed = {f.check: f.difference for f in examine(as_exported(grafted, recipe.mixer)) if not f.passed}
    assert not failed


def test_doctor_finds_a_mixer_that_decodes_something_else(converted, monkeypatch):
    whole = Hedgehog.forward

    def forgetful(self, heads, state=None):
        return whole(self, heads, None if heads.q_BTHK.shape[1] == 1 else state)

    monkeypatch.setattr(Hedgehog, "forward", forgetful)
    model = load_student(converted.folder, dtype=torch.float32)
    failed = {finding.check for finding in examine(model) if not finding.passed}
    assert "whole = token by token" in failed


def test_doctor_finds_altered_weights(converted, tmp_path):
    folder = tmp_path / "altered"
    shutil.copytree(converted.folder, folder)
    model = load_student(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(0.05 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    failed = {finding.check for finding in examine_folder(folder) if not finding.passed}
    assert failed == {"reloaded = as trained"}


def test_difference_of_nan_is_infinite():
    assert difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert difference(torch.ones(1), torch.ones(1)) == 0


def test_doctor_sees_the_whole_sequence_once(make_teacher):
    patient = Patient.of(make_teacher())
    assert patient.whole_BTV.shape[:2] == patient.tokens_BT.shape
