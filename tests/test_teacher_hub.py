"""Teachers from a stand-in Hub: what it refuses, and what is left when it goes away."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import T5Config

from tests.hub_server import asking, nobody_there

REPO = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHILD = """
import json, sys, time
from linearize.errors import TeacherError
from linearize.teacher_files import find_checkpoint
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        found = find_checkpoint(name)
        said = {"origin": found.origin, "revision": found.revision, "license": found.license, "name": found.name,
                "files": sorted(path.name for path in found.folder.iterdir())}
    except TeacherError as error:
        said = {"error": str(error)}
    print(json.dumps(said | {"seconds": time.monotonic() - start}))
"""


def ask_in_a_fresh_process(endpoint: str, names: list[str], home: Path, offline: bool = False) -> list[dict]:
    env = asking(endpoint, home) | {"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": str(int(offline))}
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    done = subprocess.run([sys.executable, "-c", CHILD, *names], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class StandInHub(BaseHTTPRequestHandler):
    """Answers as the Hub does, for one good model and several that are refused."""

    folder: Path
    paths: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.paths.append(path)
        refusals = {
            "/api/models/owner/absent": (401, "RepoNotFound"),
            "/api/models/owner/broken": (503, ""),
            "/api/models/owner/badtoken": (401, ""),
            "/owner/gated/resolve/main/config.json": (403, "GatedRepo"),
            "/owner/onlygguf/resolve/main/config.json": (404, "EntryNotFound"),
        }
        files = sorted(p.name for p in self.folder.iterdir())
        extra = ["consolidated.safetensors", "onnx/model.onnx", "README.md"]
        info = {
            "id": "x",
            "sha": COMMIT,
            "tags": ["license:mit"],
            "siblings": [{"rfilename": f} for f in files + extra],
        }
        tree = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files + extra]
        if path in refusals:
            self.reply(refusals[path][0], b"{}", body, {"X-Error-Code": refusals[path][1]})
        elif "/tree/" in path:
            self.reply(200, json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/"):
            self.reply(200, json.dumps(info).encode(), body)
        elif "/resolve/" in path:
            file = path.rsplit("/", 1)[1]
            content = (self.folder / file).read_bytes()
            if path.startswith("/owner/encdec/") and file == "config.json":
                content = T5Config(architectures=["T5ForConditionalGeneration"]).to_json_string().encode()
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self.reply(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", body)

    def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(llama_folder: Path) -> Iterator[str]:
    StandInHub.folder, StandInHub.paths = llama_folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_answers_and_then_goes_away(hub: str, llama_folder: Path, tmp_path: Path) -> None:
    names = ["good", "gated", "absent", "broken", "badtoken", "onlygguf", "encdec"]
    answers = ask_in_a_fresh_process(hub, [f"owner/{name}" for name in names], tmp_path)
    said = dict(zip(names, answers, strict=True))
    assert said["good"]["origin"] == f"owner/good@{COMMIT} from the Hugging Face Hub"
    assert said["good"]["revision"] == COMMIT
    assert said["good"]["license"] == "mit"
    assert said["good"]["name"] == "owner/good"
    assert said["good"]["files"] == sorted(path.name for path in llama_folder.iterdir())
    rules = {
        "gated": "is gated and this account or token has no access. Accept its licence on that page, then run `hf auth",
        "absent": "the Hub has no model 'owner/absent', or it is private",
        "broken": "it answered 503. Check network",
        "badtoken": "it answered 401. To renew the token, run `hf auth login`",
        "onlygguf": "'owner/onlygguf' has no config.json. For a GGUF repository, download the .gguf file",
        "encdec": "owner/encdec: is an encoder-decoder model",
    }
    for name, rule in rules.items():
        assert rule in said[name]["error"], said[name]
    fetched = {path.rsplit("/", 1)[1] for path in StandInHub.paths if path.startswith("/owner/encdec/resolve/")}
    assert fetched == {"config.json"}

    with nobody_there() as gone:
        down = ask_in_a_fresh_process(gone, ["owner/good", "owner/gated"], tmp_path)
        told = ask_in_a_fresh_process(gone, ["owner/good", "owner/gated"], tmp_path, offline=True)
    assert down[0]["origin"] == f"owner/good@{COMMIT} from the local Hub cache"
    assert f"could not fetch 'owner/gated' from {gone}: ConnectError" in down[1]["error"]
    assert max(answer["seconds"] for answer in down) < 10
    assert told[0]["revision"] == COMMIT
    assert "is not in the local Hub cache and HF_HUB_OFFLINE is set" in told[1]["error"]
