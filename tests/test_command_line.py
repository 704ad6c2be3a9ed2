"""The command line on a tiny student, and its words for bad input."""

from __future__ import annotations

import json
import shutil

import pytest

from linearize.cli import main
from tests.short_runs import BASE, SHORT


def run_cli(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["linearize", *words])
    try:
        return main()
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_command_line_generates_evaluates_and_examines(converted, text_file, tmp_path, monkeypatch, capsys):
    folder = str(shutil.copytree(converted.folder, tmp_path / "student"))  # what is measured is written into it
    assert run_cli(monkeypatch, "generate", folder, "tide salt", "gull", "--max-new-tokens", "5") == 0
    assert "tide salt" in capsys.readouterr().out
    assert run_cli(monkeypatch, "generate", folder, "tide", "--beams", "3", "--device", "cpu") == 0
    rows = tmp_path / "rows.json"
    words = ["eval", folder, "--text", str(text_file), "--lengths", "32,64", "--max-tokens", "256"]
    assert run_cli(monkeypatch, *words, "--json", str(rows)) == 0
    assert {row["length"] for row in json.loads(rows.read_text())} == {32, 64}
    assert run_cli(monkeypatch, *words, "--no-teacher") == 0
    capsys.readouterr()
    assert run_cli(monkeypatch, "doctor", folder, "--json") == 0
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))


def test_command_line_plans_and_shows_recipes(teacher_folder, monkeypatch, capsys):
    sets = [word for override in SHORT for word in ("--set", override)]
    assert run_cli(monkeypatch, "plan", "--model", str(teacher_folder), *sets, "--device", "cpu") == 0
    planned = capsys.readouterr().out
    assert "3 of 3 layers become hedgehog" in planned
    assert "tokens/s" in planned
    assert "Frozen teacher" not in planned
    base = [word for override in BASE for word in ("--set", override)]
    assert run_cli(monkeypatch, "plan", "--model", str(teacher_folder), *sets, *base, "--device", "cpu") == 0
    planned = capsys.readouterr().out
    assert "Frozen teacher" in planned
    assert "AdamW moments" in planned
    assert run_cli(monkeypatch, "recipes", "list") == 0
    assert run_cli(monkeypatch, "recipes", "show", "hedgehog") == 0
    assert "arXiv 2402.04347" in capsys.readouterr().out
    assert run_cli(monkeypatch, "recipes", "validate", "hedgehog", "--set", "stages.0.tokens=2M") == 0
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
    code = run_cli(monkeypatch, *(names.get(word, word) for word in words))
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert said in printed.replace("\n", "")
    assert "Traceback" not in printed
