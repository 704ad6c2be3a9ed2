"""The whole flow on a tiny teacher: convert, interrupt, resume, export, reload, doctor, command line."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import linearize
from linearize.checkpoint import STUDENT, load_latest
from linearize.cli import main
from linearize.doctor import CHECKS, Patient, difference, examine, examine_folder
from linearize.errors import DataError, LinearizeError, NonFiniteLossError, RecipeError, RunError, RunInterrupted
from linearize.export import load_student
from linearize.job import Conversion
from linearize.metrics import TIMING_FIELDS, read_metrics
from linearize.mixers.hedgehog import Hedgehog
from linearize.pipeline import convert
from linearize.planning import plan_conversion
from linearize.profiling import read_profile
from linearize.recipe import load_recipe, recipe_names
from linearize.stages.distil import Distil
from linearize.stages.transfer import Transfer
from linearize.teacher import load_teacher

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


@pytest.fixture
def job(teacher_folder, text_file, tmp_path):
    def make(out: str = "student", *overrides: str, resume: bool = False, overwrite: bool = False) -> Conversion:
        return Conversion(
            model=str(teacher_folder),
            out=tmp_path / out,
            data=str(text_file),
            overrides=(*SHORT, *overrides),
            device="cpu",
            resume=resume,
            overwrite=overwrite,
        )

    return make


@pytest.fixture(scope="module")
def student(teacher_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "student"
    mixed = (*SHORT, "keep_softmax=[1]")
    job = Conversion(model=str(teacher_folder), out=out, data=str(text_file), overrides=mixed, device="cpu")
    return convert(job, Console(quiet=True))


def test_streamed_layers_make_the_same_student(student, teacher_folder, text_file, tmp_path):
    overrides = (*SHORT, "keep_softmax=[1]")
    job = Conversion(str(teacher_folder), out=tmp_path / "streamed", data=str(text_file), overrides=overrides)
    job = replace(job, device="cpu", stream_layers=True, profile=True)  # neither changes a bit
    streamed = convert(job, Console(quiet=True))
    parts = [{part.part for part in read_profile(streamed.folder / "run/profile", f"stage{n}")} for n in (0, 1)]
    assert all({"teacher", "student", "loss", "backward", "optimizer", "wait"} <= found for found in parts)
    assert "--stream-layers" in json.loads((streamed.folder / "metrics.json").read_text())["command"]
    found = [(run.teacher, run.untrained, run.student) for run in (student, streamed)]
    assert found[0] == found[1]


def test_streamed_layers_do_not_train(teacher_folder, text_file, tmp_path):
    overrides = (*SHORT, "stages.1.train=[mixer, norms]", "stages.1.lora=null")
    job = Conversion(str(teacher_folder), out=tmp_path / "streamed", data=str(text_file), overrides=overrides)
    with pytest.raises(RunError, match="--stream-layers: .*trains base weights"):
        convert(replace(job, device="cpu", stream_layers=True), Console(quiet=True))


def test_convert_writes_a_loadable_measured_student(student, teacher_folder):
    facts = json.loads((student.folder / "metrics.json").read_text())
    assert facts["model"] == str(teacher_folder)
    assert "Held-out perplexity" in (student.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert [stage["name"] for stage in facts["stages"]] == ["transfer", "distil"]
    assert facts["perplexity"][0]["student"] == pytest.approx(student.student.perplexity["held-out"])
    after_training = student.stages[-1]["metrics"]["eval/held-out"]
    assert student.student.perplexity["held-out"] == pytest.approx(after_training, rel=1e-4)  # merging rounds
    card = (student.folder / "README.md").read_text()
    assert str(teacher_folder.parent) not in card  # nor of the text, nor of the student
    data = ModelCard(card).data
    assert data.base_model is None  # the teacher is a folder here; the Hub takes names of its own only
    assert "linear-attention" in data.tags
    assert data.eval_results[0].metric_value == pytest.approx(student.student.perplexity["held-out"], abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(student.folder)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 7
    assert not list(student.folder.glob(".export*"))


def test_transfer_lowers_the_error(student):
    records = read_metrics(student.folder / "run" / "metrics.jsonl")
    errors = [record["error"] for record in records if record["stage"] == 0]
    assert errors[-1] < errors[0]


def test_doctor_is_green_on_the_export(student):
    findings = examine_folder(student.folder)
    assert len(findings) == len(CHECKS) + 1
    assert [finding.check for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("kept", ["none", "[0, 1, 2]"])
def test_doctor_is_green_on_all_student_and_all_softmax_models(kept, make_teacher):
    from linearize.surgery import graft, plan_surgery

    model = make_teacher()
    if kept == "none":
        recipe = load_recipe("hedgehog")
        model = _as_exported(graft(model, plan_surgery(model, recipe.mixer)), recipe)
    assert [finding.check for finding in examine(model) if not finding.passed] == []


@pytest.mark.parametrize("name", recipe_names())
def test_doctor_is_green_on_every_shipped_mixer(name, make_teacher):
    """With parameters moved off their start, where some mistakes cancel."""
    from linearize.surgery import graft, plan_surgery

    recipe, model = load_recipe(name), make_teacher()
    grafted = graft(model, plan_surgery(model, recipe.mixer))
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    failed = {f.check: f.difference for f in examine(_as_exported(grafted, recipe)) if not f.passed}
    assert not failed


@pytest.mark.parametrize("name", recipe_names())
def test_initial_values_survive_construction_and_loading(name, make_teacher, tmp_path):
    """transformers' post_init would set every Linear anew, and does so without a word."""
    from linearize.modeling import STUDENT_CLASSES, student_config
    from linearize.surgery import graft, plan_surgery

    recipe, starts = load_recipe(name), []
    for seed in (0, 1):
        model = make_teacher()
        torch.manual_seed(seed)
        grafted = graft(model, plan_surgery(model, recipe.mixer))
        starts.append({path: parameter.clone() for path, parameter in grafted.mixer_parameters().items()})
    config = student_config(model.config, recipe.mixer, tuple(grafted.students))
    fresh = dict(STUDENT_CLASSES["llama"][1](config).named_parameters())
    for path, start in starts[0].items():
        if torch.equal(start, starts[1][path]):  # the same whatever the seed
            assert torch.equal(fresh[path], start), path
        elif start.numel() >= 500:
            assert 0.8 < fresh[path].std() / start.std() < 1.25, path
    student = _as_exported(grafted, recipe)
    student.save_pretrained(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[path], start) for path, start in starts[1].items())


def _as_exported(grafted, recipe):
    from linearize.modeling import STUDENT_CLASSES, student_config

    config = student_config(grafted.model.config, recipe.mixer, tuple(grafted.students))
    model = STUDENT_CLASSES["llama"][1](config)
    model.load_state_dict(grafted.model.state_dict())
    return model.eval()


def test_doctor_finds_a_mixer_that_decodes_something_else(student, monkeypatch):
    whole = Hedgehog.forward

    def forgetful(self, heads, state=None):
        return whole(self, heads, None if heads.q_BTHK.shape[1] == 1 else state)

    monkeypatch.setattr(Hedgehog, "forward", forgetful)
    model = load_student(student.folder, dtype=torch.float32)
    failed = {finding.check for finding in examine(model) if not finding.passed}
    assert "whole = token by token" in failed


def test_doctor_finds_altered_weights(student, tmp_path):
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(student.folder, folder)
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


def _losses(folder: Path) -> list[dict]:
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]


BASE = (
    "stages.0.train=[mixer, qkv]",
    "stages.0.optimizer.lr=0.001",
    "stages.1.train=[all]",
    "stages.1.lora=null",
    "stages.1.optimizer.lr=0.0001",
)
"""Stages that train base weights, with the frozen teacher that they need."""


@pytest.mark.parametrize(
    "overrides", [(), BASE, (*BASE, "precision=bf16")], ids=["adapters", "base weights", "base weights from bf16"]
)
def test_interrupted_at_three_random_steps_and_resumed_is_the_same_run(job, monkeypatch, overrides):
    whole = convert(job("whole", *overrides), Console(quiet=True))
    stop_at = sorted(random.Random(7).sample(range(2, 38), 3))
    seen = {"calls": 0}

    def stopping(original):
        def train_micro_batch(self, batch, backward):
            seen["calls"] += 1
            if stop_at and seen["calls"] == stop_at[0]:
                stop_at.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, backward)

        return train_micro_batch

    for stage in (Transfer, Distil):
        monkeypatch.setattr(stage, "train_micro_batch", stopping(stage.train_micro_batch))
    interruptions = 0
    while True:
        try:
            broken = convert(job("broken", *overrides, resume=interruptions > 0), Console(quiet=True))
            break
        except RunInterrupted as stopped:
            assert "--resume" in str(stopped)
            interruptions += 1
    assert interruptions == 3
    assert _losses(broken.folder) == _losses(whole.folder)
    assert broken.student == whole.student
    left, right = load_student(whole.folder).state_dict(), load_student(broken.folder).state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_trained_base_weights_reach_the_export_in_the_models_dtype(job, teacher_folder):
    out = convert(job("base", *BASE, "precision=bf16"), Console(quiet=True))
    student, teacher = load_student(out.folder), AutoModelForCausalLM.from_pretrained(teacher_folder)
    for name, parameter in student.named_parameters():
        if ".mixer." in name:
            assert parameter.dtype == torch.float32, name
        else:
            assert parameter.dtype == torch.bfloat16, name
        if "proj" in name or "embed" in name:  # a norm's weight of 1 needs more steps to be another bf16 number
            assert not torch.equal(parameter, teacher.get_parameter(name).bfloat16()), name
    assert examine_folder(out.folder)
    after = out.stages[-1]["metrics"]["eval/held-out"]
    assert out.student.perplexity["held-out"] == pytest.approx(after, rel=0.02)  # rounding to bf16
    kl = [record["kl"] for record in read_metrics(out.folder / "run" / "metrics.jsonl") if record["stage"] == 1]
    assert kl[-1] < kl[0]


def test_checkpoints_hold_the_base_weights_that_have_been_trained(job):
    out = convert(job("base", *BASE, "stages.1.train=[norms]"), Console(quiet=True))
    checkpoint = load_latest(out.folder / "run")
    assert checkpoint is not None
    saved = set(load_file(checkpoint.folder / STUDENT))
    weights = {name.removesuffix(".weight").rpartition(".")[2] for name in saved if ".mixer." not in name}
    assert weights == {"q_proj", "k_proj", "v_proj", "input_layernorm", "post_attention_layernorm", "norm"}


def test_compiling_is_off_by_default_and_changes_no_number(job, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    plain = convert(job("plain"), Console(quiet=True))
    assert not compiled
    fast = convert(replace(job("fast"), compile=True), Console(quiet=True))
    assert len(compiled) == 3
    assert _losses(fast.folder) == _losses(plain.folder)
    assert "--compile" in json.loads((fast.folder / "metrics.json").read_text())["command"]


def test_a_stage_that_contradicts_the_family_is_refused_before_anything_is_run(job):
    with pytest.raises(RecipeError, match=r"stages\.1\.train: o trains the weights of o_proj, which lora adapts"):
        convert(job("wrong", "stages.1.train=[o, lora]"), Console(quiet=True))
    assert not list((job("wrong").out / "run").glob("checkpoints/*"))


def test_non_finite_loss_stops_and_keeps_the_last_good_state(job, monkeypatch):
    plain = Transfer.train_micro_batch
    calls = {"count": 0}

    def poisoned(self, batch, backward):
        calls["count"] += 1
        return plain(self, batch, (lambda loss: backward(loss * float("nan"))) if calls["count"] == 7 else backward)

    monkeypatch.setattr(Transfer, "train_micro_batch", poisoned)
    with pytest.raises(NonFiniteLossError, match="step"):
        convert(job("nan"), Console(quiet=True))
    monkeypatch.setattr(Transfer, "train_micro_batch", plain)
    resumed = convert(job("nan", resume=True), Console(quiet=True))
    whole = convert(job("whole"), Console(quiet=True))
    assert _losses(resumed.folder) == _losses(whole.folder)


def test_resume_refuses_another_recipe(job):
    convert(job("first"), Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearize.pipeline.load_teacher", None)  # it is said before anything is loaded
        with pytest.raises(RunError, match=r"another recipe \(stages.0.optimizer.lr was [0-9.]+, is 0.5\)"):
            convert(job("first", "stages.0.optimizer.lr=0.5", resume=True), Console(quiet=True))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.jsonl", b'{"title": "x", "body": "y"}', "2 other columns"),
        ("a.txt", b"", "there is no text in it"),
        ("a.txt", b"gr\xfcn", "iconv"),
        ("a.csv", b"a,b", "unsupported suffix"),
        ("a.jsonl", None, "no such file or folder"),
    ],
)
@pytest.mark.parametrize("option", ["data", "heldout"])
def test_text_that_cannot_be_read_costs_no_teacher(tmp_path, text_file, monkeypatch, option, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("linearize.pipeline.load_teacher", None)
    named = {"data": str(text_file), option: str(tmp_path / name)}
    with pytest.raises(DataError, match=said):
        convert(Conversion("llama", out=tmp_path / "out", device="cpu", **named), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_text_that_fills_no_row_is_said_before_anything_is_measured(job, text_file, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("the tide came in")
    monkeypatch.setattr("linearize.pipeline.measure", None)
    short = replace(job("short", "stages.1.length=64"), data=str(tmp_path / "short.txt"), heldout=str(text_file))
    with pytest.raises(DataError, match=r"short\.txt: the text has \d+ tokens, less than one row of 32"):
        convert(short, Console(quiet=True))
    assert not (tmp_path / "short" / "run" / "run.json").exists()


@pytest.mark.parametrize("overrides", [(), (*BASE, "precision=bf16")], ids=["adapters", "base weights"])
def test_resume_of_a_finished_run_writes_the_same_student(job, overrides):
    first = convert(job("first", *overrides), Console(quiet=True))
    again = convert(job("first", *overrides, resume=True), Console(quiet=True))
    assert again.student == first.student


@pytest.mark.parametrize("overrides", [(), BASE], ids=["adapters", "base weights"])
def test_killed_as_a_stage_begins_and_resumed_is_the_same_run(job, monkeypatch, overrides):
    """The last checkpoint is then of the end of the stage before."""
    whole = convert(job("whole", *overrides), Console(quiet=True))

    def killed(self, batch, backward):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Distil, "train_micro_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(job("killed", *overrides), Console(quiet=True))
    resumed = convert(job("killed", *overrides, resume=True), Console(quiet=True))
    assert _losses(resumed.folder) == _losses(whole.folder)
    assert resumed.student == whole.student


def test_an_existing_folder_is_refused_and_kept(job, tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="taken"):
            convert(job("taken", overwrite=overwrite), Console(quiet=True))
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_python_api(teacher_folder, text_file, tmp_path):
    result = linearize.convert(
        str(teacher_folder), data=str(text_file), overrides=SHORT, out=tmp_path / "api", device="cpu", quiet=True
    )
    assert linearize.load_student(result.folder).config.linearize["layers"] == [0, 1, 2]
    assert linearize.load_recipe("hedgehog").name == "hedgehog"


def _run_cli(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["linearize", *words])
    try:
        return main()
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_command_line_generates_evaluates_and_examines(student, text_file, tmp_path, monkeypatch, capsys):
    folder = str(student.folder)
    assert _run_cli(monkeypatch, "generate", folder, "tide salt", "gull", "--max-new-tokens", "5") == 0
    assert "tide salt" in capsys.readouterr().out
    assert _run_cli(monkeypatch, "generate", folder, "tide", "--beams", "3", "--device", "cpu") == 0
    rows = tmp_path / "rows.json"
    words = ["eval", folder, "--text", str(text_file), "--lengths", "32,64", "--max-tokens", "256"]
    assert _run_cli(monkeypatch, *words, "--json", str(rows)) == 0
    assert {row["length"] for row in json.loads(rows.read_text())} == {32, 64}
    assert _run_cli(monkeypatch, *words, "--no-teacher") == 0
    capsys.readouterr()
    assert _run_cli(monkeypatch, "doctor", folder, "--json") == 0
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))


def test_a_plan_counts_what_training_base_weights_costs(teacher_folder):
    recipe = load_recipe("hedgehog", [*SHORT, *BASE, "precision=bf16"])
    plan = plan_conversion(str(teacher_folder), recipe, "cpu")
    mixers = plan.parameters
    whole = sum(parameter.numel() for parameter in load_teacher(str(teacher_folder)).model.parameters())
    projections = 3 * (64 * 64 + 2 * 32 * 64)
    transfer, distil = plan.stages
    assert plan.teacher_bytes == 2 * whole + 4 * mixers
    assert (transfer.trained, distil.trained) == (mixers + projections, mixers + whole)
    assert (transfer.master_bytes, distil.master_bytes) == (2 * projections, 2 * whole)
    assert distil.moment_bytes == 8 * (mixers + whole)
    assert plan_conversion(str(teacher_folder), load_recipe("hedgehog", SHORT), "cpu").teacher_bytes == 0


def test_command_line_plans_and_shows_recipes(teacher_folder, monkeypatch, capsys):
    sets = [word for override in SHORT for word in ("--set", override)]
    assert _run_cli(monkeypatch, "plan", "--model", str(teacher_folder), *sets, "--device", "cpu") == 0
    planned = capsys.readouterr().out
    assert "3 of 3 layers become hedgehog" in planned
    assert "tokens/s" in planned
    assert "Frozen teacher" not in planned
    base = [word for override in BASE for word in ("--set", override)]
    assert _run_cli(monkeypatch, "plan", "--model", str(teacher_folder), *sets, *base, "--device", "cpu") == 0
    planned = capsys.readouterr().out
    assert "Frozen teacher" in planned
    assert "AdamW moments" in planned
    assert _run_cli(monkeypatch, "recipes", "list") == 0
    assert _run_cli(monkeypatch, "recipes", "show", "hedgehog") == 0
    assert "arXiv 2402.04347" in capsys.readouterr().out
    assert _run_cli(monkeypatch, "recipes", "validate", "hedgehog", "--set", "stages.0.tokens=2M") == 0
    assert "tokens: 2000000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes", "show", "hedgehod"], "hedgehog"),
        (["recipes", "validate", "hedgehog", "--set", "mixer.normalisatoin=exp"], "normalisation"),
        (["convert", "--model", "smolm2", "--out", "OUT"], "smollm2"),
        (["convert", "--model", "TEACHER", "--out", "OUT", "--data", "no/such/file.txt"], "no/such/file.txt"),
        (["convert", "--model", "TEACHER", "--out", "OUT", "--data", "TEXT", "--tokens", "40"], "smaller than one"),
        (["convert", "--model", "TEACHER", "--out", "OUT", "--data", "TEXT", "--text-field", "words"], "words"),
        (["convert", "--model", "TEACHER", "--out", "OUT", "--device", "abacus"], "abacus"),
        (["eval", "OUT", "--text", "TEXT"], "no config.json"),
        (["generate", "OUT", "hello"], "OUT"),
        (["doctor", "OUT"], "OUT"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    words, said, teacher_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"TEACHER": str(teacher_folder), "TEXT": str(text_file), "OUT": str(tmp_path / "OUT")}
    (tmp_path / "OUT").mkdir()
    code = _run_cli(monkeypatch, *(names.get(word, word) for word in words))
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert said in printed.replace("\n", "")
    assert "Traceback" not in printed


def test_errors_are_value_errors():
    assert issubclass(LinearizeError, ValueError)
