"""The whole flow on a tiny teacher: convert, export, reload; what is refused before anything is run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import linearize
from linearize.checkpoint import STUDENT, load_latest
from linearize.doctor import examine_folder
from linearize.errors import DataError, LinearizeError, RecipeError, RunError
from linearize.export import load_student
from linearize.job import Conversion
from linearize.metrics import read_metrics
from linearize.pipeline import convert
from linearize.planning import plan_conversion
from linearize.profiling import read_profile
from linearize.recipe import load_recipe
from linearize.teacher import load_teacher
from tests.short_runs import BASE, SHORT, losses


def test_streamed_layers_make_the_same_student(converted, teacher_folder, text_file, tmp_path):
    overrides = (*SHORT, "keep_softmax=[1]")
    job = Conversion(str(teacher_folder), out=tmp_path / "streamed", data=str(text_file), overrides=overrides)
    job = replace(job, device="cpu", stream_layers=True, profile=True)  # neither changes a bit
    streamed = convert(job, Console(quiet=True))
    parts = [{part.part for part in read_profile(streamed.folder / "run/profile", f"stage{n}")} for n in (0, 1)]
    assert all({"teacher", "student", "loss", "backward", "optimizer", "wait"} <= found for found in parts)
    assert "--stream-layers" in json.loads((streamed.folder / "metrics.json").read_text())["command"]
    found = [(run.teacher, run.untrained, run.student) for run in (converted, streamed)]
    assert found[0] == found[1]


def test_streamed_layers_do_not_train(teacher_folder, text_file, tmp_path):
    overrides = (*SHORT, "stages.1.train=[mixer, norms]", "stages.1.lora=null")
    job = Conversion(str(teacher_folder), out=tmp_path / "streamed", data=str(text_file), overrides=overrides)
    with pytest.raises(RunError, match="--stream-layers: .*trains base weights"):
        convert(replace(job, device="cpu", stream_layers=True), Console(quiet=True))


def test_convert_writes_a_loadable_measured_student(converted, teacher_folder):
    facts = json.loads((converted.folder / "metrics.json").read_text())
    assert facts["model"] == str(teacher_folder)
    assert "Held-out perplexity" in (converted.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert [stage["name"] for stage in facts["stages"]] == ["transfer", "distil"]
    assert facts["perplexity"][0]["student"] == pytest.approx(converted.student.perplexity["held-out"])
    after_training = converted.stages[-1]["metrics"]["eval/held-out"]
    assert converted.student.perplexity["held-out"] == pytest.approx(after_training, rel=1e-4)  # merging rounds
    card = (converted.folder / "README.md").read_text()
    assert str(teacher_folder.parent) not in card  # nor of the text, nor of the student
    data = ModelCard(card).data
    assert data.base_model is None  # the teacher is a folder here; the Hub takes names of its own only
    assert "linear-attention" in data.tags
    assert data.eval_results[0].metric_value == pytest.approx(converted.student.perplexity["held-out"], abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(converted.folder)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 7
    assert not list(converted.folder.glob(".export*"))


def test_transfer_lowers_the_error(converted):
    records = read_metrics(converted.folder / "run" / "metrics.jsonl")
    errors = [record["error"] for record in records if record["stage"] == 0]
    assert errors[-1] < errors[0]


def test_trained_base_weights_reach_the_export_in_the_models_dtype(short_job, teacher_folder):
    out = convert(short_job("base", *BASE, "precision=bf16"), Console(quiet=True))
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


def test_checkpoints_hold_the_base_weights_that_have_been_trained(short_job):
    out = convert(short_job("base", *BASE, "stages.1.train=[norms]"), Console(quiet=True))
    checkpoint = load_latest(out.folder / "run")
    assert checkpoint is not None
    saved = set(load_file(checkpoint.folder / STUDENT))
    weights = {name.removesuffix(".weight").rpartition(".")[2] for name in saved if ".mixer." not in name}
    assert weights == {"q_proj", "k_proj", "v_proj", "input_layernorm", "post_attention_layernorm", "norm"}


def test_compiling_is_off_by_default_and_changes_no_number(short_job, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    plain = convert(short_job("plain"), Console(quiet=True))
    assert not compiled
    fast = convert(replace(short_job("fast"), compile=True), Console(quiet=True))
    assert len(compiled) == 3
    assert losses(fast.folder) == losses(plain.folder)
    assert "--compile" in json.loads((fast.folder / "metrics.json").read_text())["command"]


def test_a_stage_that_contradicts_the_family_is_refused_before_anything_is_run(short_job):
    with pytest.raises(RecipeError, match=r"stages\.1\.train: o trains the weights of o_proj, which lora adapts"):
        convert(short_job("wrong", "stages.1.train=[o, lora]"), Console(quiet=True))
    assert not list((short_job("wrong").out / "run").glob("checkpoints/*"))


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


def test_text_that_fills_no_row_is_said_before_anything_is_measured(short_job, text_file, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("the tide came in")
    monkeypatch.setattr("linearize.pipeline.measure", None)
    short = replace(short_job("short", "stages.1.length=64"), data=str(tmp_path / "short.txt"), heldout=str(text_file))
    with pytest.raises(DataError, match=r"short\.txt: the text has \d+ tokens, less than one row of 32"):
        convert(short, Console(quiet=True))
    assert not (tmp_path / "short" / "run" / "run.json").exists()


def test_an_existing_folder_is_refused_and_kept(short_job, tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="taken"):
            convert(short_job("taken", overwrite=overwrite), Console(quiet=True))
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_python_api(teacher_folder, text_file, tmp_path):
    result = linearize.convert(
        str(teacher_folder), data=str(text_file), overrides=SHORT, out=tmp_path / "api", device="cpu", quiet=True
    )
    assert linearize.load_student(result.folder).config.linearize["layers"] == [0, 1, 2]
    assert linearize.load_recipe("hedgehog").name == "hedgehog"


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


def test_errors_are_value_errors():
    assert issubclass(LinearizeError, ValueError)
