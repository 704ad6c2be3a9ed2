"""A student goes to the Hub and comes back; what stands in the way is said first, and the token is in no word of it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from torch import Tensor
from transformers import PreTrainedModel

from linearize import pipeline, tables
from linearize.card import PLACE, model_card
from linearize.cli import main
from linearize.errors import HubError
from linearize.export import export_student, load_student
from linearize.hub import Push, check_account, push
from linearize.recipe import Recipe, load_recipe
from linearize.surgery import graft, plan_surgery
from tests.hub_server import READ_ONLY, TOKEN, Hub, asking, nobody_there, running_hub
from tests.metrics_of_a_run import METRICS


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("swa-sink", ["mixer.window=8"])


@pytest.fixture(scope="module")
def exported(
    make_teacher: Callable[..., PreTrainedModel], tokenizer: Any, recipe: Recipe, tmp_path_factory: Any
) -> Path:
    """A finished student in three shards."""
    folder: Path = tmp_path_factory.mktemp("student")
    model = make_teacher()
    grafted = graft(model, plan_surgery(model, recipe.mixer, (1,)))
    export_student(grafted, tokenizer, recipe, folder)
    load_student(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "run").mkdir()
    (folder / "run" / "checkpoint.bin").write_text("stays")
    (folder / ".hidden.json").write_text("{}")
    return folder


@pytest.fixture
def student(exported: Path, recipe: Recipe, tmp_path: Path) -> Path:
    """A copy to push from; weights, which nobody writes to, are links."""
    folder = tmp_path / "student"
    (folder / "run").mkdir(parents=True)
    for path in exported.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).hardlink_to(path)
        elif path.is_file():
            shutil.copy(path, folder)
    (folder / "run" / "checkpoint.bin").write_text("stays")
    (folder / "evals").mkdir()
    (folder / "evals" / "perplexity.json").write_text("[]")
    write_metrics(folder, recipe)
    return folder


def write_metrics(folder: Path, recipe: Recipe, **teacher: Any) -> None:
    metrics = {**METRICS, "teacher": {**METRICS["teacher"], **teacher}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "README.md").write_text(model_card(recipe, metrics))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as huggingface_hub's endpoint; a token that may write is set."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        # the name in that module, not `time.sleep`: other threads sleep too
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _seconds: None))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def quiet(_text: str) -> None:
    pass


def test_pushed_and_loaded_by_another_process(
    hub: Hub, student: Path, exported: Path, make_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Through the real client both ways: every byte of the weights, and a student that runs without linearize."""
    said: list[str] = []
    url = push(Push(student, "user/student"), said.append)
    assert url.startswith(f"{hub.endpoint}/user/student/commit/")
    files = hub.repos["user/student"].branches["main"]
    for path in exported.glob("*.safetensors"):
        assert files[path.name] == path.read_bytes()
    assert {"config.json", "modeling_linearized.py", "recipe.yaml", "metrics.json", "README.md"} <= files.keys()
    assert "evals/perplexity.json" in files
    assert not any("run" in name.split("/") or name.startswith(".") for name in files)
    assert PLACE not in files["README.md"].decode()
    card = files["README.md"].decode()
    for loaded in ("AutoModelForCausalLM", "AutoTokenizer"):  # without it the tokenizer asks whether to run the code
        assert f'{loaded}.from_pretrained("user/student", trust_remote_code=True)' in card
    torch.save(make_tokens(1, 30), tmp_path / "tensor.pt")
    code = """
import hashlib, json, sys, torch
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/student", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1]), use_cache=False).logits, sys.argv[1])
assert "linearize" not in sys.modules
folder = Path(snapshot_download("user/student"))
print(json.dumps({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}))
"""
    environment = asking(hub.endpoint, tmp_path / "home")
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code, str(tmp_path / "tensor.pt")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in exported.glob("*.safetensors")}
    assert json.loads(done.stdout.splitlines()[-1]) == sent
    with torch.no_grad():
        expected = load_student(exported)(make_tokens(1, 30), use_cache=False).logits
    assert torch.equal(torch.load(tmp_path / "tensor.pt"), expected)


def test_a_model_that_pushes_itself_takes_its_code_along(hub: Hub, exported: Path) -> None:
    load_student(exported).push_to_hub("user/again")
    files = hub.repos["user/again"].branches["main"]
    assert files["modeling_linearized.py"] == (exported / "modeling_linearized.py").read_bytes()
    assert {"config.json", "model.safetensors"} <= files.keys()


def test_no_local_folder_leaves(hub: Hub, student: Path, recipe: Recipe) -> None:
    """Neither in what convert writes, nor in what was measured later; what lies here still tells where files lie."""
    home = "/home/me/secret work"
    data = [{"source": f"{home}/a.parquet"}, {"source": "owner/text"}]
    command = f"linearize convert --model '{home}/models/tiny/' --recipe /home/me/r.yaml --data '{home}/b.jsonl=0.5'"
    command += " --data owner/other --set 'data=[/home/me/c.txt]' --out o"
    metrics = {
        **METRICS,
        "model": f"{home}/models/tiny/",
        "teacher": {**METRICS["teacher"], "origin": f"folder {home}/models/tiny"},
        "text": {**METRICS["text"], "name": f"{home}/b.jsonl (0.5 of the tokens), owner/other (0.5 of the tokens)"},
        "settings": {"data": data},
        "command": command,
    }
    (student / "metrics.json").write_text(json.dumps(metrics))
    (student / "README.md").write_text(model_card(recipe, metrics))
    (student / "recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    measured = {"made": {"command": f"linearize eval '{home}/o' --text /mnt/x.txt"}, "rows": [{"source": "x"}]}
    (student / "evals" / "perplexity.json").write_text(json.dumps(measured))
    card = (student / "README.md").read_text()
    said = "--model 'tiny' --recipe r.yaml --data 'b.jsonl=0.5' --data owner/other --set 'data=[c.txt]' --out o"
    assert said in card
    assert "| folder tiny |" in card
    assert "| b.jsonl (0.5 of the tokens), owner/other (0.5 of the tokens) |" in card

    push(Push(student, "user/student"), quiet)
    files = hub.repos["user/student"].branches["main"]
    for part in (b"/home", b"me/", b"secret", b"/mnt"):
        assert [name for name, content in files.items() if part in content] == []
    assert json.loads(files["metrics.json"])["model"] == "tiny"
    assert json.loads(files["evals/perplexity.json"])["made"]["command"] == "linearize eval 'o' --text x.txt"
    assert yaml.safe_load(files["recipe.yaml"])["data"] == [{"source": "a.parquet"}, {"source": "owner/text"}]
    assert json.loads((student / "metrics.json").read_text())["model"] == f"{home}/models/tiny/"


def test_a_dropped_connection_in_the_middle_of_an_upload(hub: Hub, student: Path) -> None:
    hub.drops = 2
    push(Push(student, "user/student"), quiet)
    assert hub.drops == 0
    names = {path.name for path in student.glob("*.safetensors")}
    assert names <= hub.repos["user/student"].branches["main"].keys()


def test_a_push_that_broke_off_goes_on(hub: Hub, student: Path) -> None:
    """What had arrived is not sent again."""
    hub.drop_after, hub.drops = 1, 10_000
    with pytest.raises(HubError, match=r"user/student: the connection broke: .* Repeat the command: .* not sent again"):
        push(Push(student, "user/student"), quiet)
    arrived = list(hub.uploads)
    assert arrived
    assert hub.repos["user/student"].branches["main"] == {}
    hub.drops = 0
    push(Push(student, "user/student"), quiet)
    assert len(hub.uploads) == len(set(hub.uploads)) == len(list(student.glob("*.safetensors")))
    assert hub.uploads[: len(arrived)] == arrived


def test_who_may_see_it(hub: Hub, student: Path, recipe: Recipe) -> None:
    push(Push(student, "user/open"), quiet)
    push(Push(student, "user/asked", private=True), quiet)
    write_metrics(student, recipe, gated=True)
    push(Push(student, "user/gated"), quiet)
    write_metrics(student, recipe, gated=None)
    push(Push(student, "user/unknown"), quiet)
    push(Push(student, "team/public", private=False), quiet)
    assert {name: repo.private for name, repo in hub.repos.items()} == {
        "user/open": False,
        "user/asked": True,
        "user/gated": True,
        "user/unknown": True,
        "team/public": False,
    }


def test_a_branch(hub: Hub, student: Path) -> None:
    push(Push(student, "user/student", revision="second"), quiet)
    branches = hub.repos["user/student"].branches
    assert branches["main"] == {}
    assert "config.json" in branches["second"]
    push(Push(student, "user/student", revision="second"), quiet)  # it exists now


def test_a_repository_of_somebody_elses(hub: Hub, student: Path, tmp_path: Path) -> None:
    push(Push(student, "user/student"), quiet)
    push(Push(student, "user/student"), quiet)  # this folder made it
    (student / "run" / "pushed.json").unlink()
    with pytest.raises(HubError, match=r"user/student: exists already.*another name.*--update.*--revision"):
        push(Push(student, "user/student"), quiet)
    push(Push(student, "user/student", update=True), quiet)


@pytest.mark.parametrize(
    ("license", "said"),
    [
        (None, "licence of the teacher owner/teacher is unknown"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0, forbids derivatives"),
        ("house-rules", "house-rules, is not known to permit derivatives"),
    ],
)
def test_a_licence_is_said_before_anything_leaves(
    hub: Hub, student: Path, recipe: Recipe, license: str | None, said: str
) -> None:
    write_metrics(student, recipe, license=license)
    with pytest.raises(HubError, match=f"{said}.*Nothing was sent.*--accept-license"):
        push(Push(student, "user/student"), quiet)
    assert hub.received == []
    words: list[str] = []
    push(Push(student, "user/student", accept_license=True), words.append)
    assert any(said in text for text in words)


def test_conditions_of_a_licence_are_said(hub: Hub, student: Path, recipe: Recipe) -> None:
    write_metrics(student, recipe, license="llama3.2")
    words: list[str] = []
    push(Push(student, "user/student"), words.append)
    assert any("Built with Llama" in text for text in words)


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "user/student", r"user/student: there is no token\. .*hf auth login"),
        ("hf_wrongwrongwrong", "user/student", r"user/student: the Hub does not know this token\. .*hf auth login"),
        (READ_ONLY, "user/student", r"user/student: this token may not write there\. .*write access"),
        (TOKEN, "stranger/student", r"account 'user' cannot write there\. It may write to: user, team"),
        (TOKEN, "student", "student: names no owner. .*owner/name"),
        (TOKEN, "user/a/b", "user/a/b: .*owner/name"),
        (TOKEN, "user/wrong name", "user/wrong name: .*owner/name"),
    ],
)
def test_refusals(
    hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, said: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=said) as caught:
        push(Push(student, repo), quiet)
    assert token is None or token not in str(caught.value)
    assert hub.uploads == []


def test_no_network(student: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody_there() as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone)
        said = f"{gone.removeprefix('http://')}/user/student: the connection broke: .*Repeat the command"
        with pytest.raises(HubError, match=said):
            check_account("user/student")


def test_what_is_no_student(hub: Hub, student: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"is no finished student: it lacks config\.json, .*finished conversion"):
        push(Push(tmp_path / "nowhere", "user/student"), quiet)
    text = (student / "README.md").read_text()
    (student / "README.md").write_text(text.replace("license: apache-2.0", "license: [", 1))
    with pytest.raises(HubError, match=r"README\.md: its metadata is not valid"):
        push(Push(student, "user/student"), quiet)
    assert hub.repos == {}


def test_the_token_is_nowhere(
    hub: Hub,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither in what is printed, logged, uploaded or written, whether the push goes well or not."""
    caplog.set_level(logging.DEBUG)
    for token, repo in (
        (TOKEN, "user/student"),
        (TOKEN, "stranger/x"),
        (READ_ONLY, "user/y"),
        ("hf_badbadbadbad", "user/z"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["linearize", "push", str(student), repo])
        try:
            code = main()
        except SystemExit as stopped:
            code = stopped.code
        assert code == (0 if repo == "user/student" else 2)
        printed = "".join(capfd.readouterr())
        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        uploaded = [content for repo in hub.repos.values() for content in repo.branches["main"].values()]
        assert token not in printed
        assert token not in caplog.text
        assert not any(token.encode() in content for content in [*written, *uploaded])


def test_convert_and_push(
    hub: Hub, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An account that may not write is refused before training; the student goes out after it."""
    began: list[object] = []
    monkeypatch.setattr(pipeline, "convert", lambda job, _console: began.append(job))
    monkeypatch.setattr(tables, "conversion_report", lambda _result: "converted")
    base = ["linearize", "convert", "--model", "smollm2", "--out", str(student), "--private", "--push"]
    monkeypatch.setattr(sys, "argv", [*base, "stranger/student"])
    assert main() == 2
    assert "cannot write there" in " ".join(capfd.readouterr().err.split())
    assert began == []
    monkeypatch.setattr(sys, "argv", [*base, "user/student"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert len(began) == 1
    assert hub.repos["user/student"].private
    assert "config.json" in hub.repos["user/student"].branches["main"]
