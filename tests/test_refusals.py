"""Wrong input: the command line says what is wrong in one paragraph, before anything is trained and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from linearize import cli
from linearize.checkpoint import list_checkpoints
from linearize.data import generate as writing
from linearize.data.writer import Sampling
from linearize.errors import LinearizeError, RecipeError, RunError, TeacherError
from linearize.export import load_student
from linearize.job import Conversion
from linearize.metrics import read_metrics
from linearize.pipeline import convert
from linearize.teacher import load_teacher

QUIET = Console(quiet=True)
SETTINGS = (
    *(f"stages.{stage}.{setting}" for stage in (0, 1) for setting in ("length=32", "batch=1", "micro_batch=1")),
    "stages.0.tokens=64",
    "stages.1.tokens=64",
    "heldout_tokens=256",
    "precision=fp32",
)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function: words of a command line -> its exit code, and all that it said in one line."""

    def go(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["linearize", *map(str, words)])
        monkeypatch.setattr(cli.loud_console, "width", 1000)  # long paths are not broken
        capfd.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = capfd.readouterr()
        return code, " ".join((told.out + told.err).split())

    return go


@pytest.fixture(scope="module")
def student(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("made") / "student"
    convert(Conversion(str(teacher_folder), out=out, data=str(text_file), overrides=SETTINGS, device="cpu"), QUIET)
    return out


def conversion(model: Path, text: Path, out: Path, *overrides: str, overwrite: bool = False) -> Conversion:
    settings = (*SETTINGS, *overrides)
    return Conversion(str(model), out=out, data=str(text), overrides=settings, device="cpu", overwrite=overwrite)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["stages.1.lora.targets=[attn]"],
            r"stages.1.lora.targets: no projection is called attn; this model has down_",
        ),
        (["keep_softmax=[0, 1, 2]"], "keep_softmax: leaves no layer to replace. Take layers out of it"),
    ],
)
def test_what_a_late_stage_cannot_do_is_refused_before_the_first_one(
    teacher_folder: Path, text_file: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    """A run that has begun cannot go on with another recipe: what it has trained would be lost."""
    with pytest.raises(LinearizeError, match=said):
        convert(conversion(teacher_folder, text_file, tmp_path / "out", *overrides), QUIET)
    assert list_checkpoints(tmp_path / "out" / "run") == []


def test_stages_with_different_adapters_are_refused_before_the_first_one(
    teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    stage = "{kind: distil, tokens: 64, length: 32, batch: 1, micro_batch: 1, lora: {r: %d, targets: [%s]}}"
    same = [stage % (8, "attention"), stage % (8, "self_attn.o_proj, attention")]  # spelt differently
    convert(conversion(teacher_folder, text_file, tmp_path / "same", f"stages=[{','.join(same)}]"), QUIET)
    other = f"stages=[{stage % (8, 'attention')}, {stage % (4, 'attention')}]"
    with pytest.raises(RecipeError, match=r"stages.1.lora: an earlier stage has other adapters: r=8"):
        convert(conversion(teacher_folder, text_file, tmp_path / "other", other), QUIET)
    assert list_checkpoints(tmp_path / "other" / "run") == []


def test_a_student_outlives_what_stops_the_run_that_was_to_replace_it(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    shutil.copytree(student, out)
    for model in (tmp_path / "misspelt", student):
        with pytest.raises(LinearizeError):
            convert(conversion(model, text_file, out, overwrite=True), QUIET)
        assert load_student(out).config.linearize is not None
        assert (out / "run" / "results.json").is_file()


def test_a_broken_teacher_is_named_before_it_teaches(
    teacher_folder: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(teacher_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="broken: its perplexity is nan on held-out: its weights are broken, or"):
        convert(conversion(broken, text_file, tmp_path / "out"), QUIET)
    assert list_checkpoints(tmp_path / "out" / "run") == []
    job = writing.Generation(str(broken), tmp_path / "written.parquet", 8, Sampling(), device="cpu")
    with pytest.raises(TeacherError, match="its scores are not numbers"):
        writing.generate(job, lambda text: None, lambda text: None)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("pickle", r"its .bin files hold more than tensors.*Pass a checkpoint with safetensors"),
        (
            "heads",
            r"its config cannot be read: .*hidden size \(64\) is not a multiple of the number of attention heads",
        ),
        ("gguf", r"its config cannot be read: .*Check that the file is complete"),
    ],
)
def test_teachers_that_cannot_be_read(teacher_folder: Path, tmp_path: Path, fault: str, said: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    model = str(folder)
    if fault == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({"x": Payload()}, folder / "pytorch_model.bin", pickle_module=pickle)
    elif fault == "heads":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    else:
        (folder / "x.gguf").write_bytes(b"GGUFgarbage")
        model = str(folder / "x.gguf")
    with pytest.raises(TeacherError, match=said):
        load_teacher(model)


def test_a_student_is_no_teacher(student: Path, run: Run) -> None:
    code, said = run("plan", "--model", student, "--device", "cpu")
    assert code == cli.USER_ERROR
    assert "the model is a student already. Convert its teacher" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes", "validate", "lizard", "--set", "seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["recipes", "validate", "lizard", "--set", "heldout_tokens=1"], "heldout_tokens: Input should be greater"),
        (["recipes", "show", "{teacher}/model.safetensors"], "model.safetensors: cannot be read as text"),
        (["convert", "--model", "{teacher}", "--data", ""], "--data: is empty. Give a file"),
        (["convert", "--model", "{teacher}", "--device", "mps"], "--device: 'mps' is not supported; use cpu or cuda"),
        (["plan", "--model", "{teacher}", "--predict", "--device", "foo"], "--device: 'foo' is no usable device: "),
        (["plan", "--model", "{teacher}", "--predict", "--audit"], "--audit: compares layers with their weights"),
        (["plan", "--model", "{teacher}", "--processes", "2", "--quantize", "4bit"], "--quantize: is not part of a"),
        (["eval", "{student}", "--text", "x", "--teacher", "t", "--no-teacher"], "--teacher: contradicts --no-teacher"),
        (["speed", "{student}", "--teacher", "t", "--no-teacher"], "--teacher: contradicts --no-teacher"),
        (
            ["data", "recall", "--model", "m", "--tokens", "1k", "--out", "r.parquet", "--tasks", "passkeys"],
            "--tasks: unknown recall task 'passkeys'; did you mean 'passkey'?",
        ),
    ],
)
def test_the_place_the_cause_and_the_remedy(
    run: Run, student: Path, teacher_folder: Path, words: list[str], said: str
) -> None:
    code, told = run(*(word.format(teacher=teacher_folder, student=student) for word in words))
    assert code == cli.USER_ERROR
    assert said in told
    assert len(told) < 700


def test_known_keys_are_listed_once(run: Run, teacher_folder: Path, tmp_path: Path) -> None:
    shutil.copy(teacher_folder / "config.json", tmp_path / "recipe.yaml")
    code, said = run("recipes", "validate", tmp_path / "recipe.yaml")
    assert code == cli.USER_ERROR
    assert said.count("known keys: ") == 1
    assert said.count("unknown key") > 10


@pytest.mark.parametrize("entry", ["x", {"format": 1}, {"format": 1, "mixer": {"kind": "zork"}, "layers": [0]}])
@pytest.mark.parametrize("command", ["generate", "doctor", "eval", "speed"])
def test_a_damaged_config_is_named_by_its_folder(
    run: Run, student: Path, tmp_path: Path, command: str, entry: Any
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(student, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "linearize": entry}))
    more = {"generate": ["hello"], "eval": ["--text", "x.txt", "--no-teacher"], "speed": ["--no-teacher"]}
    code, said = run(command, folder, *more.get(command, []))
    assert code == cli.USER_ERROR
    assert f"{folder}, " in said
    assert run("report", folder)[0] == 0


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
@pytest.mark.parametrize("words", [["eval", "--text", "x.txt"], ["speed"], ["push", "owner/name"]])
def test_damaged_metrics_are_named(run: Run, student: Path, tmp_path: Path, words: list[str], content: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(student, folder)
    (folder / "metrics.json").write_text(content)
    code, said = run(words[0], folder, *words[1:])
    assert code == cli.USER_ERROR
    assert "metrics.json: " in said


def test_a_damaged_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": 0, "step": 1}\n[1]\n{"stage": 0')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: holds no record"):
        read_metrics(path)


def test_results_that_cannot_be_written_are_refused_before_they_are_measured(
    run: Run, student: Path, tmp_path: Path
) -> None:
    shutil.copytree(student, tmp_path / "student", ignore=shutil.ignore_patterns("evals"))
    (tmp_path / "student" / "evals").write_text("in the way")
    code, said = run("speed", tmp_path / "student", "--no-teacher", "--lengths", "16")
    assert code == cli.USER_ERROR
    assert "cannot be written" in said
    assert "tokens/s" not in said


@pytest.mark.parametrize("code", cli.SYSTEM_ERRORS)
def test_errors_of_the_system_are_no_tracebacks(run: Run, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code), "/some/where")

    monkeypatch.setattr(cli, "app", fail)
    ended, said = run("families")
    assert ended == cli.USER_ERROR
    assert f"/some/where: {os.strerror(code)}. {cli.SYSTEM_ERRORS[code]}" in said


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside training, which saves first: while models are loaded, measured and written."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command()(interrupt)
    monkeypatch.setattr(cli, "app", app)
    code, said = run()
    assert code == cli.INTERRUPTED
    assert "interrupted; what was finished is kept" in said


def test_an_error_of_ours_stays_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(OSError, match="Bad file"):
        run("families")
