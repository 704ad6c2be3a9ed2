"""One revision of a teacher on the Hub, and runs that go on with the weights they began with; on a stand-in Hub."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file, save_file

from linearize import pipeline, teacher_files
from linearize.cli import main
from linearize.data.generate import Generation, generate
from linearize.data.writer import Sampling, Writer
from linearize.doctor import examine_folder
from linearize.errors import RunError, RunInterrupted, TeacherError
from linearize.evals.subjects import identity_of, surgery_of
from linearize.evaluate import teacher_of
from linearize.export import load_student, load_student_tokenizer
from linearize.job import Conversion
from linearize.pipeline import convert
from linearize.teacher import load_teacher
from linearize.teacher_files import Checkpoint, ModelConfig, Wheel, find_checkpoint
from tests.hub_server import Hub, Repo, running_hub

SHORT = (
    *("stages.0.length=32", "stages.0.batch=2", "stages.0.micro_batch=1", "stages.0.tokens=256"),
    *("stages.1.length=32", "stages.1.batch=2", "stages.1.micro_batch=1", "stages.1.tokens=256"),
    *("heldout_tokens=256", "precision=fp32"),
)
WHEEL = Wheel(package="demo", version="1.0", file="demo.whl", sha256="1" * 64, member="tiny", member_sha256="2" * 64)
NO_HUB = "http://127.0.0.1:9"


@dataclass
class Published:
    """`owner/tiny` on the stand-in Hub: a first commit, tagged v1, and main, which can move on to a second."""

    hub: Hub
    repo: Repo
    second_files: dict[str, bytes]
    first: str
    patch: pytest.MonkeyPatch

    def move_main(self) -> str:
        self.repo.branches["main"] = dict(self.second_files)
        return self.repo.commit("main")

    def forget(self, commit: str) -> None:
        """As after a history was rewritten."""
        del self.repo.commits[commit]

    def be(self, endpoint: str) -> None:
        self.patch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def published(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    second = Path(shutil.copytree(teacher_folder, tmp_path / "second"))
    weights = load_file(second / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, second / "model.safetensors", {"format": "pt"})
    (second / "chat_template.jinja").write_text("second")
    repo = Repo(private=False)
    repo.branches["main"] = contents(teacher_folder)
    first = repo.commit("main")
    repo.branches["v1"] = repo.branches["refs/pr/1"] = repo.branches["main"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        hub.repos["owner/tiny"] = repo
        found = Published(hub, repo, contents(second), first, monkeypatch)
        found.be(hub.endpoint)
        yield found


@pytest.fixture
def demo(published: Published, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """`demo` is a known name of `owner/tiny`, with a wheel for where the Hub fails."""
    config = ModelConfig(hub="owner/tiny", license="mit", wheel=WHEEL)
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/demo.yaml").write_text(config.model_dump_json())
    monkeypatch.setattr(teacher_files, "shipped", lambda kind: tmp_path / kind)
    unpacked = Checkpoint(teacher_folder, "demo-1.0/tiny", "tiny inside the wheel", sha256=WHEEL.member_sha256)
    monkeypatch.setattr(teacher_files, "_from_wheel", lambda wheel, config: replace(unpacked, license=config.license))
    return published


# ------------------------------------------------------------------------------------------------- names


def test_a_branch_a_tag_or_a_commit(published: Published) -> None:
    """Of the weights, of the tokenizer and of its chat template."""
    first, second = published.first, published.move_main()
    asked = {"": second, "@main": second, "@v1": first, "@refs/pr/1": first, f"@{first}": first}
    found = {revision: find_checkpoint(f"owner/tiny{revision}") for revision in asked}
    assert {revision: checkpoint.revision for revision, checkpoint in found.items()} == asked
    assert found["@v1"].name == "owner/tiny"
    assert found["@v1"].origin == f"owner/tiny@{first} from the Hugging Face Hub"
    old, new = load_teacher("owner/tiny@v1"), load_teacher("owner/tiny")
    for ours, theirs in zip(old.model.parameters(), new.model.parameters(), strict=True):
        torch.testing.assert_close(ours * 1.5, theirs)
    assert (old.tokenizer.chat_template, new.tokenizer.chat_template) == (None, "second")


def test_a_known_name_at_a_revision(demo: Published) -> None:
    second = demo.move_main()
    assert [find_checkpoint(name).revision for name in ("demo", "demo@v1")] == [second, demo.first]
    wheel = find_checkpoint(f"demo@{WHEEL.member_sha256}")
    assert (wheel.origin, wheel.revision, wheel.license) == ("tiny inside the wheel", None, "mit")


def test_a_folder_may_have_an_at_in_its_name(published: Published, teacher_folder: Path) -> None:
    shutil.copytree(teacher_folder, "owner/tiny@v1")
    assert find_checkpoint("owner/tiny@v1").origin == "folder owner/tiny@v1"
    assert load_student("owner/tiny@v1").config.model_type == "llama"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("owner/tiny@v9", r"co/owner/tiny: 'owner/tiny' has no revision 'v9'\. Give a branch, a tag or a whole commit"),
        ("owner/other@v1", r"the Hub has no model 'owner/other'"),
        ("demo@v9", r"'owner/tiny' has no revision 'v9'\..*wheel demo is not that revision"),
        ("demmo@v1", r"unknown model 'demmo@v1'; did you mean 'demo'\?"),
        ("second@v1", r"'second@v1' does not exist, and only a model on the Hub has .*'@v1' to take second as it is"),
        ("./second@v1", r"'\./second@v1' does not exist, and only .*Leave out '@v1' to take \./second as it is"),
        ("second/tiny.gguf@v1", r"'second/tiny\.gguf@v1' does not exist\. Check the path; .*owner/name@revision"),
        ("./nowhere@v1", r"'\./nowhere@v1' does not exist\. Check the path"),
        ("owner/tiny@", r"'owner/tiny@' does not exist\. .*owner/name@revision"),
        ("@v1", r"unknown model '@v1'"),
    ],
)
def test_what_is_no_revision(demo: Published, model: str, said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        find_checkpoint(model)


# ------------------------------------------------------------------------------------------------- without the Hub


def test_what_is_cached_needs_no_hub(demo: Published) -> None:
    find_checkpoint("owner/tiny@v1")
    demo.be(NO_HUB)
    for revision in ("v1", demo.first):
        found = find_checkpoint(f"owner/tiny@{revision}")
        assert found.origin == f"owner/tiny@{demo.first} from the local Hub cache"
        assert found.gated is None  # then `push` makes the student's repository private
    with pytest.raises(TeacherError, match=f"could not fetch 'owner/tiny@main' from {NO_HUB}: .*Check network"):
        find_checkpoint("owner/tiny@main")
    with pytest.raises(TeacherError, match=r"could not fetch 'owner/tiny@v2'.*wheel demo is not that revision"):
        find_checkpoint("demo@v2")
    demo.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint("demo@v1").revision == demo.first
    with pytest.raises(TeacherError, match="'owner/tiny@v2' is not in the local Hub cache and HF_HUB_OFFLINE is set"):
        find_checkpoint("owner/tiny@v2")


def test_a_cached_commit_outlives_what_the_hub_forgets(published: Published) -> None:
    """A tag does not: it may stand for something else by now."""
    find_checkpoint("owner/tiny@v1")
    published.move_main()
    del published.repo.branches["v1"]
    published.forget(published.first)
    assert find_checkpoint(f"owner/tiny@{published.first}").revision == published.first
    with pytest.raises(TeacherError, match="has no revision 'v1'"):
        find_checkpoint("owner/tiny@v1")


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def job(text_file: Path, tmp_path: Path) -> Callable[..., Conversion]:
    def make(model: str, resume: bool = False) -> Conversion:
        out = tmp_path / "student"
        return Conversion(model, out=out, data=str(text_file), overrides=SHORT, device="cpu", resume=resume)

    return make


def break_off(job: Conversion) -> None:
    """Train, and stop before anything is exported."""

    def stop(*_: object) -> None:
        raise RunInterrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_export", stop)
        with pytest.raises(RunInterrupted):
            convert(job, Console(quiet=True))


def go_on(job: Conversion, capfd: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What a resumed run says, and what it records of its teacher."""
    convert(job, Console(stderr=True, width=200))
    metrics: dict[str, Any] = json.loads((Path(job.out) / "metrics.json").read_text())
    return capfd.readouterr().err, metrics["teacher"]


def test_a_pinned_run_says_so_everywhere(
    published: Published, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.move_main()
    words = ["convert", "--model", "owner/tiny@v1", "--data", str(text_file), "--device", "cpu", "--out", "student"]
    monkeypatch.setattr(sys, "argv", ["linearize", *words, *(word for one in SHORT for word in ("--set", one))])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    for name in ("metrics.json", "run/run.json"):
        facts = json.loads(Path("student", name).read_text())
        assert facts["model"] == "owner/tiny@v1"
        assert facts["command"].startswith("linearize convert --model owner/tiny@v1 ")
        assert (facts["teacher"]["name"], facts["teacher"]["revision"]) == ("owner/tiny", published.first)
    card = Path("student/README.md").read_text()
    for said in (
        "base_model: owner/tiny\n",
        f"revision | {published.first} |",
        "--model owner/tiny@v1 ",
        f"`--model owner/tiny@{published.first}` names",
    ):
        assert said in card
    assert teacher_of("student") == f"owner/tiny@{published.first}"  # what eval and speed put beside it
    weights = load_file("student/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights, load_teacher("owner/tiny@v1").model.get_input_embeddings().weight)

    student = Repo(private=False)  # as `push --revision second` leaves it
    student.branches["second"] = contents(Path("student"))
    published.hub.repos["user/student"] = student
    name = "user/student@second"
    assert torch.equal(load_student(name).get_input_embeddings().weight, weights)
    assert load_student_tokenizer(name).eos_token == "<end>"
    assert surgery_of(name)[0].kind == "hedgehog"
    assert identity_of(name) == f"{name} {student.commit('second')}"
    assert all(finding.passed for finding in examine_folder(name))
    with pytest.raises(TeacherError, match="'user/student' has no revision 'third'. Give a branch, a tag"):
        load_student("user/student@third")
    with pytest.raises(RunError, match="student@v1: no such folder"):
        load_student("./student@v1")


@pytest.mark.parametrize("model", ["owner/tiny", "owner/tiny@main"])
def test_a_run_goes_on_with_its_commit_when_the_branch_has_moved(
    published: Published,
    teacher_folder: Path,
    job: Callable[..., Conversion],
    capfd: pytest.CaptureFixture[str],
    model: str,
) -> None:
    break_off(job(model))
    published.move_main()
    shutil.rmtree(constants.HF_HUB_CACHE)  # it is fetched again
    said, teacher = go_on(job(model, resume=True), capfd)
    assert f"Going on with owner/tiny@{published.first}, the teacher that this run began with.\n" in said
    assert teacher["revision"] == published.first
    weights, first = (load_file(folder / "model.safetensors") for folder in (Path("student"), teacher_folder))
    assert torch.equal(weights["model.embed_tokens.weight"], first["model.embed_tokens.weight"])

    shutil.rmtree(constants.HF_HUB_CACHE)
    published.forget(published.first)
    del published.repo.branches["v1"], published.repo.branches["refs/pr/1"]
    with pytest.raises(TeacherError, match=f"owner/tiny: 'owner/tiny' has no revision '{published.first}'"):
        convert(job(model, resume=True), Console(quiet=True))


def test_a_run_from_the_wheel_goes_on_with_it_when_the_hub_is_back(
    demo: Published, job: Callable[..., Conversion], capfd: pytest.CaptureFixture[str]
) -> None:
    demo.be(NO_HUB)
    break_off(job("demo"))
    demo.be(demo.hub.endpoint)
    said, teacher = go_on(job("demo", resume=True), capfd)
    assert f"Going on with demo@{WHEEL.member_sha256}, the teacher that this run began with.\n" in said
    assert (teacher["origin"], teacher["revision"]) == ("tiny inside the wheel", None)
    assert not any("resolve" in request for request in demo.hub.received)
    assert teacher_of(job("demo").out) == f"demo@{WHEEL.member_sha256}"


def test_a_run_from_the_hub_does_not_go_on_with_the_wheel(demo: Published, job: Callable[..., Conversion]) -> None:
    break_off(job("demo"))
    demo.be(NO_HUB)
    break_off(job("demo", resume=True))  # from the cache
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(TeacherError, match=f"could not fetch 'owner/tiny@{demo.first}'.*is not that revision"):
        convert(job("demo", resume=True), Console(quiet=True))


def test_text_is_written_on_by_the_teacher_that_began_it(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=0, length=16)
    job = Generation("owner/tiny", tmp_path / "written.parquet", 64, sampling, batch=2, device="cpu")
    write, said = Writer.write, []

    def write_once(self: Writer, documents: range) -> Any:
        if documents.start:
            raise KeyboardInterrupt
        return write(self, documents)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write_once)
        with pytest.raises(RunInterrupted):
            generate(job, said.append, said.append)
    published.move_main()
    with pytest.raises(RunError, match=r"was begun with another revision \(was .*, is "):  # asked for by name
        generate(replace(job, model="owner/tiny@main"), said.append, said.append)
    generate(job, said.append, said.append)
    assert f"Going on with owner/tiny@{published.first}, the teacher that this text was begun with." in said
