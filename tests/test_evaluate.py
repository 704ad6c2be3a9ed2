"""`linearize eval` on a tiny student: cells, positions, branches, layers, and the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_families import tiny_teacher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearize.attention import StudentAttention
from linearize.cli import main
from linearize.errors import DataError, RunError
from linearize.evals import subjects
from linearize.evals.bench import Wanted
from linearize.evals.cells import Cells
from linearize.evals.diagnostics import _spearman, diagnose, pair
from linearize.evals.positions import departure, edges_of, position_rows, window_losses
from linearize.evals.recall import Answered
from linearize.evals.records import BRANCHES, DiagnosticRow, PositionRow, RecallRow, TaskRow, read_rows
from linearize.evals.samples import Sampling, generate_from_folder
from linearize.evals.speed import SpeedSettings, measure_speed
from linearize.evaluate import evaluate, parse_lengths
from linearize.export import export_student, load_student
from linearize.machine import choose_machine
from linearize.mixers.swa import SwaConfig
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery
from linearize.teacher import load_teacher
from linearize.teacher_files import Checkpoint


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def folders(make_teacher: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher whose tokens are bytes, an untrained student with two branches, one without, and a text."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_of_bytes()
    teacher = root / "teacher"
    tokenizer.save_pretrained(teacher)
    make_teacher(vocab_size=257, eos_token_id=0, bos_token_id=0, max_position_embeddings=500).save_pretrained(teacher)
    for name, overrides in (("lolcats", ["mixer.window=8"]), ("hedgehog", [])):
        recipe = load_recipe(name, overrides)
        model = load_teacher(str(teacher)).model
        student = graft(model, plan_surgery(model, recipe.mixer, recipe.keep_softmax))
        export_student(student, tokenizer, recipe, root / name)
        (root / name / "metrics.json").write_text(json.dumps({"model": str(teacher)}))
    (root / "text.txt").write_text("The tide came in over the salt flats and the gulls rose. " * 60)
    return {name: str(root / name) for name in ("teacher", "lolcats", "hedgehog", "text.txt")}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["linearize", "eval", *words, "--device", "cpu"])
    try:
        return main()
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_buckets_are_means_over_positions(make_teacher: Callable[..., PreTrainedModel]) -> None:
    tokens = np.random.default_rng(0).integers(2, 97, 450).astype(np.int32)
    model = make_teacher()
    found = window_losses(model, tokens, length=150, max_tokens=450)
    windows = torch.from_numpy(tokens.astype(np.int64)).view(3, 150)
    with torch.no_grad():
        own = (
            model(windows, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0].neg()
        )
    assert found.edges == (1, 64, 128, 150) == edges_of(150)
    torch.testing.assert_close(torch.tensor(found.buckets)[:, 1], own[:, 63:127].mean(1), rtol=1e-4, atol=1e-4)
    assert found.mean == pytest.approx(own.mean().item(), rel=1e-4)
    rows = position_rows("teacher", "text", found)
    assert sum(row.tokens for row in rows) == 3 * 149
    assert sum(row.nll * row.tokens for row in rows) / (3 * 149) == pytest.approx(found.mean)


def test_where_a_student_leaves_its_teacher() -> None:
    def row(start: int, log_ratio: float | None, error: float | None) -> PositionRow:
        return PositionRow(
            model="student", source="a", length=512, start=start, stop=2 * start, tokens=1, nll=1.0,
            log_ratio=log_ratio, log_ratio_error=error,
        )  # fmt: skip

    near, unsure, far = row(64, 0.01, 0.001), row(128, 0.2, 0.1), row(256, 0.2, 0.01)
    assert departure([far, near, unsure]) == 256
    assert departure([near, unsure]) is None
    assert departure([far], threshold=1.3) is None
    assert departure([row(64, 1.0, None), row(128, None, None)]) is None


def test_cells_are_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> int:
        calls.append(1)
        return len(calls)

    assert [Cells(tmp_path).once({"a": 1}, measure) for _ in range(3)] == [1, 1, 1]
    assert Cells(tmp_path).once({"a": 2}, measure) == 2


def test_a_cell_is_of_weights_settings_kernels_and_versions(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured of something else is not printed as if it had been measured now."""
    student, teacher = (tmp_path / name for name in ("hedgehog", "teacher"))
    for folder in (student, teacher):
        shutil.copytree(folders[folder.name], folder)
    words = [str(student), "--teacher", str(teacher), "--recall", "passkey", "--lengths", "300", "--depths", "1"]
    asked: list[str] = []

    def count(model: PreTrainedModel, *_: object) -> list[Answered]:
        asked.append(model.config.model_type)
        return [Answered(depth=0.5, count=1, correct=0)]

    def measured() -> list[str]:
        asked.clear()
        assert run(monkeypatch, *words, "--samples", "1") == 0
        return list(asked)

    monkeypatch.setattr("linearize.evaluate.ask", count)
    both = ["llama", "linearized_llama"]
    assert measured() == both
    assert measured() == []
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))  # no weight changes
    assert measured() == both[:1]
    monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
    assert measured() == both
    monkeypatch.setattr("linearize.evals.bench.versions", lambda: {"linearize": "another"})
    assert measured() == both
    assert measured() == []


def test_a_task_that_no_length_fits_is_said_before_any_model_is_asked(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("linearize.evaluate.ask", None)
    words = ["--recall", "passkey,niah-1", "--lengths", "300", "--out", str(tmp_path)]
    assert run(monkeypatch, folders["hedgehog"], *words) == 2
    assert "300 tokens are too few" in " ".join(capsys.readouterr().err.split())


def test_folders_that_cannot_be_read_and_prompts_without_tokens(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no student"):
        measure_speed(Path(folders["teacher"]), SpeedSettings(lengths=(8,)), None, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    for folder, said in ((tmp_path, "abacus"), (tmp_path / "a" / "b" / "c", "no such folder")):
        with pytest.raises(RunError, match=said):
            load_student(folder)
    with pytest.raises(RunError, match="prompt 2: has no tokens"):
        generate_from_folder(folders["hedgehog"], ["a", ""], Sampling(max_new_tokens=1), device="cpu")
    shutil.copytree(folders["hedgehog"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(RunError, match="its tokenizer cannot be loaded.*save_pretrained"):
        generate_from_folder(str(tmp_path / "bare"), ["a"], Sampling(max_new_tokens=1), device="cpu")


def test_a_chat_prompt_has_one_bos(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The template spells it, and the tokenizer would put one more in front of every text."""
    tokenizer = tokenizer_of_bytes()
    tokenizer.add_special_tokens({"bos_token": "Z"})
    bos: int = tokenizer.bos_token_id  # type: ignore[assignment]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="Z $A", special_tokens=[("Z", bos)])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    read: list[list[int]] = []

    def keep(config: object, length: int, more: int) -> None:
        read.append([length, more])

    monkeypatch.setattr("linearize.evals.samples.load_student_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr("linearize.evals.samples.check_reach", keep)
    for chat in (True, False):
        generate_from_folder(folders["hedgehog"], ["abc"], Sampling(max_new_tokens=1), chat, "cpu")
    assert read == [[4, 1], [4, 1]]


def test_perplexity_positions_recall_and_probe_by_one_command(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folders["lolcats"], "--text", folders["text.txt"], "--lengths", "600,700", "--max-tokens", "1400"]
    words += [
        "--positions",
        "--probe",
        "--recall",
        "passkey",
        "--depths",
        "2",
        "--samples",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    assert "beyond the 500 positions" in " ".join(printed.err.split())
    assert "leaves its teacher" in printed.out
    models = ["teacher", "student", *BRANCHES]
    for kind in ("perplexity", "positions", "recall"):
        read = read_rows(tmp_path, kind)
        assert read is not None
        assert list(dict.fromkeys(row.model for row in read[0])) == models  # type: ignore[attr-defined]
        assert "--probe" in read[1].command
    rows = read_rows(tmp_path, "perplexity")
    assert rows is not None
    nll = {(row.model, row.length): row.nll for row in rows[0]}  # type: ignore[attr-defined]
    assert len({round(value, 6) for value in nll.values()}) == len(nll)  # each branch changes something
    recalled = read_rows(tmp_path, "recall")
    assert recalled is not None
    assert all(isinstance(row, RecallRow) and row.beyond_positions for row in recalled[0])

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("linearize.evaluate.window_losses", broken)
    monkeypatch.setattr("linearize.evaluate.ask", broken)
    assert run(monkeypatch, *words) == 0  # all cells are there


def test_the_hub_is_asked_once(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the teacher is loaded: as itself, with a window, and beside the student."""
    asked: list[str] = []

    def answer(repo: str, revision: str | None) -> Checkpoint:
        asked.append(repo)
        return Checkpoint(Path(folders["teacher"]), repo, "the Hub", revision="c0ffee", hub=repo)

    monkeypatch.setattr("linearize.teacher_files._from_hub", answer)
    words = [folders["lolcats"], "--teacher", "owner/name", "--recall", "passkey", "--lengths", "300", "--depths", "1"]
    assert run(monkeypatch, *words, "--samples", "1", "--diagnostics", "--probe", "--out", str(tmp_path)) == 0
    assert asked == ["owner/name"]


def test_diagnostics_and_bad_input(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folders["hedgehog"], "--diagnostics", "--out", str(tmp_path)) == 0
    read = read_rows(tmp_path, "diagnostics")
    assert read is not None
    rows = [row for row in read[0] if isinstance(row, DiagnosticRow)]
    measures = {"teacher_entropy", "student_entropy", "monotonicity", "attention_kl", "relative_error"}
    assert {row.measure for row in rows} == measures
    assert {row.layer for row in rows} == {0, 1, 2}
    assert {(row.start, row.stop) for row in rows if row.start is not None} >= {(0, 128), (128, 512)}
    assert all(math.isfinite(row.value) for row in rows)
    assert all(abs(row.value) <= 1.0001 for row in rows if row.measure == "monotonicity")
    for place, said in (
        (["--probe", "--recall", "passkey"], "nothing to switch off"),
        (["--positions", "--recall", "passkey"], "--text"),
        (["--recall", "passkeys"], "passkey"),
        ([], "nothing to measure"),
        (["--diagnostics", "--no-teacher"], "teacher"),
        (["--recall", "passkey", "--lengths", "60"], "too few"),
        (["--tasks-dir", "no/such/folder"], "no folder"),
    ):
        capsys.readouterr()
        assert run(monkeypatch, folders["hedgehog"], *place, "--out", str(tmp_path / "bad")) == 2
        assert said in capsys.readouterr().err


def test_a_window_over_everything_is_its_teacher(folders: dict[str, str]) -> None:
    """Rows of the teacher itself: no KL, the same entropy, ranks in the order of q.k."""
    teacher = load_teacher(folders["teacher"]).model
    recipe = load_recipe("swa-sink", ["mixer.window=300"])
    student = load_teacher(folders["teacher"]).model
    grafted = graft(student, plan_surgery(student, recipe.mixer))
    tokens = torch.randint(1, 257, (1, 200), generator=torch.Generator().manual_seed(0))
    student.config.linearize = {"mixer": recipe.mixer.model_dump(mode="json"), "layers": sorted(grafted.students)}
    values = {
        (row.layer, row.measure): row.value for row in diagnose(pair(student, teacher), tokens) if row.start is row.head
    }
    for layer in range(3):
        assert values[layer, "relative_error"] < 1e-9
        assert abs(values[layer, "attention_kl"]) < 1e-5
        assert values[layer, "monotonicity"] == pytest.approx(1, abs=1e-6)
        assert values[layer, "student_entropy"] == pytest.approx(values[layer, "teacher_entropy"], rel=1e-4)


def test_students_in_the_place_of_sliding_layers(
    make_teacher: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes part in an evaluation is grafted where the student is, also where the teacher slides already."""
    model = make_teacher("mistral", sliding_window=16)
    recipe = load_recipe("lolcats", ["mixer.window=8"])
    grafted = graft(model, plan_surgery(model, recipe.mixer, replace_sliding=True))
    model.config.linearize = {"mixer": recipe.mixer.model_dump(mode="json"), "layers": [0, 1, 2]}
    teacher = make_teacher("mistral", sliding_window=16)
    assert pair(model, teacher).observed.students.keys() == grafted.students.keys()
    loaded = SimpleNamespace(model=make_teacher("mistral", sliding_window=16))
    monkeypatch.setattr(subjects, "load_teacher", lambda *_, **__: loaded)
    checkpoint = Checkpoint(Path(), "mistral", "nowhere")
    with subjects._windowed(checkpoint, choose_machine("cpu", "fp32"), SwaConfig(window=8), (0, 2)) as windowed:
        students = [module.layer_idx for module in windowed.modules() if isinstance(module, StudentAttention)]
    assert students == [0, 2]


def test_a_table_of_positions_ends(tmp_path: Path) -> None:
    """GPT-2 cannot read beyond it, and a GPU would say so by an assertion that ends the process."""
    model = tiny_teacher("gpt2")  # 512 positions
    recipe = load_recipe("hedgehog")
    student = graft(model, plan_surgery(model, recipe.mixer))
    export_student(student, tokenizer_of_bytes(), recipe, tmp_path)
    wanted = Wanted(str(tmp_path), None, tmp_path, recall=("passkey",), lengths=(512, 600), device="cpu")
    with pytest.raises(DataError, match=r"600 tokens: the model has learned 512 positions"):
        evaluate(wanted, print)
    with pytest.raises(RunError, match=r"502, 512 tokens: the model has learned 512 positions, and 11 are taken"):
        measure_speed(tmp_path, SpeedSettings(lengths=(501, 502, 512), decode=1), None, "cpu")
    (text,) = generate_from_folder(str(tmp_path), ["a" * 510], Sampling(max_new_tokens=3), device="cpu")
    assert text
    with pytest.raises(RunError, match=r"a prompt of 511 tokens and 3 new ones are too many for 512 learned positions"):
        generate_from_folder(str(tmp_path), ["a" * 511], Sampling(max_new_tokens=3), device="cpu")


def test_rank_correlation_has_mean_ranks_for_ties() -> None:
    score = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 0]]).view(1, 1, 1, 9)
    weight = torch.tensor([[0.0, 0, 0, 1, 2, 3, 5, 4, 9]]).view(1, 1, 1, 9)
    ranks = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [2, 2, 2, 4, 5, 6, 8, 7]])
    expected = torch.corrcoef(ranks)[0, 1]
    torch.testing.assert_close(_spearman(score, weight, 7)[0, 0, 0], expected)  # row 7 does not see key 8
    assert _spearman(score, weight, 6).isnan().all()


def test_the_short_form_writes_ratios(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.json"
    words = [folders["hedgehog"], "--text", folders["text.txt"], "--lengths", "64", "--json", str(rows)]
    assert run(monkeypatch, *words, "--out", str(tmp_path)) == 0
    (row,) = json.loads(rows.read_text())
    assert row["ratio"] == pytest.approx(row["student"] / row["teacher"])


def test_tasks_of_a_folder(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"doc_id": doc, "idx": index, "context": f"Tide {doc} is", "continuation": end, "label": doc % 2}
        for doc in range(6)
        for index, end in enumerate((" high.", " a long way out."))
    ]
    (tmp_path / "tides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [folders["hedgehog"], "--tasks-dir", str(tmp_path), "--limit", "5", "--out", str(tmp_path)]
    assert run(monkeypatch, *words) == 0
    read = read_rows(tmp_path, "tasks")
    assert read is not None
    teacher, student = (row for row in read[0] if isinstance(row, TaskRow))
    assert (teacher.model, teacher.count, teacher.chance, teacher.scorer) == ("teacher", 5, 0.5, "linearize")
    assert teacher.recovered is None
    assert student.paired_p is not None
    assert "McNemar" in capsys.readouterr().out


def test_all_is_everything_that_the_student_has(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Wanted] = []

    def note(what: Wanted, _say: object) -> dict[str, list[object]]:
        wanted.append(what)
        return {}

    monkeypatch.setattr("linearize.evaluate.evaluate", note)
    assert run(monkeypatch, folders["lolcats"], "--all", "--text", folders["text.txt"], "--lengths", "512,16384") == 0
    assert run(monkeypatch, folders["hedgehog"], "--all", "--no-teacher") == 0
    hybrid, linear = wanted
    assert hybrid.probe
    assert hybrid.positions
    assert hybrid.diagnostics
    assert hybrid.recall == ("all",)
    assert hybrid.max_tokens == 16384
    assert (linear.probe, linear.positions, linear.diagnostics) == (False, False, False)
    assert (linear.teacher, linear.max_tokens) == (None, 8192)


def test_lengths_are_powers_of_two() -> None:
    assert parse_lengths("512, 1k,16K,128k,1500") == [512, 1024, 16384, 131072, 1500]
    for bad in ("", "k", "1", "1kk", "half"):
        with pytest.raises(DataError, match="--lengths"):
            parse_lengths(bad)
