"""The output folder: never overwrites by accident, never deletes what is not ours, one process at a time."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import RunError
from linearize.run_folder import SAME, RunFolder, open_run_folder, write_json

TEXT = {"name": "t", "epochs": 1.5}
FACTS = {"model": "m", "quantize": None, "recipe_hash": "h", "text": TEXT, "seed": 0, "command": "c"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_run(out: Path) -> None:
    with open_run_folder(out, resume=False, overwrite=False) as folder:
        folder.begin(FACTS)
        (folder.student / "config.json").write_text("{}")


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "a" / "b", resume=False, overwrite=False) as folder:
        assert folder.student == tmp_path / "a" / "b"
        assert folder.run.is_dir()
        assert folder.facts() == {}
        folder.begin(FACTS)
        assert folder.facts() == FACTS


def test_an_empty_folder_or_one_with_only_a_lock_may_be_used(tmp_path: Path) -> None:
    for _ in range(2):  # the second time it holds the lock file of a run that never began
        with open_run_folder(tmp_path, resume=False, overwrite=False):
            pass


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run_folder("out", resume=False, overwrite=False) as folder:
        monkeypatch.chdir("/")
        folder.begin(FACTS)
    assert (tmp_path / "out" / "run" / "run.json").is_file()


def test_a_used_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    before = files(tmp_path)
    with (
        pytest.raises(RunError, match="exists already and is not empty.*--overwrite, or go on with --resume"),
        open_run_folder(tmp_path / "out", resume=False, overwrite=False),
    ):
        pass
    assert files(tmp_path) == before


def test_overwrite_deletes_a_former_run_when_the_new_one_begins(tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    (tmp_path / "out" / "report").mkdir()
    (tmp_path / "out" / "report" / "index.html").write_text("x")
    before = files(tmp_path)
    with open_run_folder(tmp_path / "out", resume=False, overwrite=True) as folder:
        assert folder.facts() == folder.results() == {}
        assert files(tmp_path) == before
        began = folder.begin({**FACTS, "seed": 1})
        assert began.facts()["seed"] == 1
        assert set(files(tmp_path)) == {"out/run/.lock", "out/run/run.json"}
        with (
            pytest.raises(RunError, match="another process"),
            open_run_folder(tmp_path / "out", resume=True, overwrite=False),
        ):
            pass  # the lock outlives the deletion


def test_a_run_that_never_begins_deletes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(ZeroDivisionError), open_run_folder(tmp_path / "out", resume=False, overwrite=True):
        raise ZeroDivisionError  # a misspelt teacher, too little text
    assert files(tmp_path) == before
    with open_run_folder(tmp_path / "out", resume=True, overwrite=False) as folder:
        assert folder.begin(FACTS).facts() == FACTS


def test_a_deletion_that_broke_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all else is gone, the folder is known as a run of ours."""
    make_run(tmp_path / "out")

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with open_run_folder(tmp_path / "out", resume=False, overwrite=True) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail)
            with pytest.raises(RunError, match="config.json: cannot be deleted: Permission denied. Delete it yourself"):
                folder.begin(FACTS)
        assert (folder.run / "run.json").is_file()
    with open_run_folder(tmp_path / "out", resume=False, overwrite=True) as folder:
        folder.begin(FACTS)
    assert set(files(tmp_path)) == {"out/run/.lock", "out/run/run.json"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "nested", "file"])
def test_what_is_not_ours_is_never_deleted(tmp_path: Path, overwrite: bool, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        place = out if kind == "folder" else out / "deep" / "inside"
        place.mkdir(parents=True)
        (place / "thesis.tex").write_text("precious")
    before = files(tmp_path)
    said = "no linearize run has written" if overwrite else "exists already and is not empty"
    with pytest.raises(RunError, match=said), open_run_folder(out, resume=False, overwrite=overwrite):
        pass
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", [None, "thesis.tex"])
def test_resume_needs_a_run(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).write_text("x")
    with (
        pytest.raises(RunError, match="there is no run to go on with"),
        open_run_folder(tmp_path, resume=True, overwrite=False),
    ):
        pass
    assert set(files(tmp_path)) == ({content} if content else set())


def test_resume_and_overwrite_contradict(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RunError, match="contradict"), open_run_folder(tmp_path, resume=True, overwrite=True):
        pass


def test_resume_goes_on_with_the_same(tmp_path: Path) -> None:
    make_run(tmp_path)
    with open_run_folder(tmp_path, resume=True, overwrite=False) as folder:
        folder.begin({**FACTS, "command": "another command line may resume"})
        assert folder.facts() == FACTS  # what it began with stays


@pytest.mark.parametrize("name", SAME)
def test_resume_with_something_else_is_refused(tmp_path: Path, name: str) -> None:
    make_run(tmp_path)
    with open_run_folder(tmp_path, resume=True, overwrite=False) as folder:
        with pytest.raises(RunError, match=rf"began with another {name} \(was .*, is 'other'\)"):
            folder.begin({**FACTS, name: "other"})
        assert folder.facts() == FACTS


def test_a_run_file_of_another_version_is_no_crash(tmp_path: Path) -> None:
    make_run(tmp_path)
    with open_run_folder(tmp_path, resume=True, overwrite=False) as folder:
        write_json(folder.facts_file, {name: value for name, value in FACTS.items() if name != "text"})
        with pytest.raises(RunError, match="began with another text"):
            folder.begin(FACTS)


def test_other_weights_of_the_teacher_are_refused_where_they_were_noted(tmp_path: Path) -> None:
    make_run(tmp_path)
    with open_run_folder(tmp_path, resume=True, overwrite=False) as folder:
        folder.check_weights("samples b", "there")  # an earlier version noted none
        write_json(folder.facts_file, {**FACTS, "weights": "samples a", "teacher": {"origin": "here"}})
        folder.check_weights("samples a", "elsewhere")
        with pytest.raises(RunError, match=r"weights of m: samples a \(here\); now they are samples b \(there\)\. Put"):
            folder.check_weights("samples b", "there")


@pytest.mark.parametrize("content", ["{", "\x00", "[1]"])
def test_a_broken_run_file_is_named(tmp_path: Path, content: str) -> None:
    make_run(tmp_path)
    with open_run_folder(tmp_path, resume=True, overwrite=False) as folder:
        folder.facts_file.write_text(content)
        with pytest.raises(RunError, match=r"run\.json: cannot be read"):
            folder.begin(FACTS)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_a_folder_in_use_is_refused_and_unchanged(tmp_path: Path, options: dict[str, Any]) -> None:
    make_run(tmp_path / "out")
    before = files(tmp_path)
    asked = {"resume": False, "overwrite": False, **options}
    with open_run_folder(tmp_path / "out", resume=True, overwrite=False):  # the lock counts within a process too
        with (
            pytest.raises(RunError, match="another process is running in this folder"),
            open_run_folder(tmp_path / "out", **asked),
        ):
            pass
        assert files(tmp_path) == before
    if options:  # free again
        with open_run_folder(tmp_path / "out", **asked):
            pass


def test_the_lock_is_freed_by_an_error(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(KeyError), open_run_folder(tmp_path, resume=True, overwrite=False):
        raise KeyError
    with open_run_folder(tmp_path, resume=True, overwrite=False):
        pass


def test_results_are_measured_once(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, resume=False, overwrite=False) as folder:
        calls: list[int] = []

        def measure() -> dict[str, float]:
            calls.append(1)
            return {"ppl": 3.5}

        for _ in range(2):
            assert folder.once("teacher", measure) == {"ppl": 3.5}
        folder.record("other", None)
        assert folder.once("other", measure) is None
        assert len(calls) == 1
        assert RunFolder(tmp_path).results() == {"teacher": {"ppl": 3.5}, "other": None}


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": "ü"})
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": "ü"}
    assert set(files(tmp_path)) == {"x.json"}
    with pytest.raises(RunError, match=r"x\.json/y\.json: cannot be written: .*\. Free space, or choose a folder"):
        write_json(target / "y.json", {})
    write_json(tmp_path / "new" / "x.json", {})
    assert set(files(tmp_path)) == {"x.json", "new/x.json"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match="cannot be written: Not a directory"),
        open_run_folder(tmp_path / "file" / "out", resume=False, overwrite=False),
    ):
        pass
