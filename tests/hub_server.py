"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub asks of it, up and down."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import ModelCard

TOKEN = "hf_" + "secretsecretsecretsecret"
READ_ONLY = "hf_" + "readonlyreadonlyreadonly"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.branches.get(revision, self.commits.get(revision))

    def commit(self, revision: str) -> str:
        files = self.branches.get(revision)
        if files is None:
            return revision
        names = "".join(f"{name}:{hashlib.sha1(content).hexdigest()}" for name, content in sorted(files.items()))
        sha = hashlib.sha1(names.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha


@dataclass
class Hub:
    """The state, and how often to misbehave."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    received: list[str] = field(default_factory=list)  # "METHOD path" of every request
    uploads: list[str] = field(default_factory=list)  # sha256 of objects as they arrive
    drops: int = 0  # uploads whose connection is closed halfway
    drop_after: int = 0  # uploads that go well before that
    begun: int = 0  # uploads let through, arrived or on their way
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drops_this(self) -> bool:
        """Whether the upload that begins now loses its connection. Several begin at once, each on its own thread."""
        with self.lock:
            if self.begun >= self.drop_after and self.drops > 0:
                self.drops -= 1
                return True
            self.begun += 1
            return False


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(content))))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().strip(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refuses(self, *, writes: bool) -> bool:
        if self.token == TOKEN or (self.token == READ_ONLY and not writes):
            return False
        self.body()
        if self.token == READ_ONLY:
            self.answer(403, {"error": "Forbidden: you need a token with write access"})
        else:
            self.answer(401, {"error": "Invalid username or password."})
        return True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.received.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            if not self.refuses(writes=False):
                self.answer(200, {"type": "user", "name": "user", "orgs": [{"name": "team", "type": "org"}]})
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            self.describe(match[1], match[2], unquote(match[3] or "main"))
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], unquote(match[2]), match[3])
        else:
            self.answer(404, {"error": path})

    do_HEAD = do_GET

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        return None if found is None or (found.private and self.token not in (TOKEN, READ_ONLY)) else found

    def describe(self, name: str, what: str | None, revision: str) -> None:
        repo = self.repo(name)
        files = None if repo is None else repo.files(revision)
        if repo is None or files is None:
            self.answer(
                404, {"error": "not found"}, X_Error_Code="RepoNotFound" if repo is None else "RevisionNotFound"
            )
        elif what == "tree":
            rows = [{"type": "file", "path": path, "size": len(body), "oid": "0"} for path, body in files.items()]
            self.answer(200, rows)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": repo.commit(revision), "siblings": siblings, "private": repo.private})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        files = None if repo is None else repo.files(revision)
        if repo is None or files is None:
            code = "RepoNotFound" if repo is None else "RevisionNotFound"
            self.answer(401 if repo is None else 404, {"error": "no"}, X_Error_Code=code)
        elif path not in files:
            self.answer(404, {"error": path}, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit(revision))
        else:
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            named = {"ETag": etag, "X_Repo_Commit": repo.commit(revision), "Accept_Ranges": "bytes"}
            self.answer(200, files[path], length=str(len(files[path])), **named)

    def do_PUT(self) -> None:
        """An LFS object."""
        oid, hub = self.path.rpartition("/")[2], self.hub
        hub.received.append(f"PUT {self.path}")
        length = int(self.headers["Content-Length"])
        if hub.drops_this():
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(400, {"error": "sha256 does not match"})
            return
        hub.objects[oid] = content
        hub.uploads.append(oid)
        self.answer(200)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.received.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.validate(json.loads(self.body()))
        elif self.refuses(writes=True):
            return
        elif path == "/api/repos/create":
            self.create(json.loads(self.body()))
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/([^/]+)", path):
            repo, content = self.hub.repos[match[1]], self.body()
            {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}[match[2]](
                match[1], repo, match[3], content
            )
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(self.body()))
        elif path == "/lfs-verify":
            asked = json.loads(self.body())
            self.answer(200 if len(self.hub.objects.get(asked["oid"], b"")) == asked["size"] else 404)
        else:
            self.answer(404, {"error": path})

    def validate(self, asked: dict[str, Any]) -> None:
        try:
            ModelCard(asked["content"]).data.to_yaml()
        except ValueError as error:
            self.answer(400, {"error": str(error)})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
            return
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private)
        self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def branch(self, _name: str, repo: Repo, revision: str, _content: bytes) -> None:
        if revision in repo.branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        repo.branches[revision] = dict(repo.branches["main"])
        self.answer(200)

    def preupload(self, _name: str, _repo: Repo, _revision: str, content: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        end = self.hub.endpoint
        objects = [
            dict(item)
            if item["oid"] in self.hub.objects
            else {
                **item,
                "actions": {"upload": {"href": f"{end}/lfs/{item['oid']}"}, "verify": {"href": f"{end}/lfs-verify"}},
            }
            for item in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, revision: str, content: bytes) -> None:
        files = repo.branches[revision]
        for line in content.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.hub.objects[row["value"]["oid"]]
        sha = repo.commit(revision)
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on 127.0.0.1 until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def asking(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that asks this Hub: without the user's tokens, caches and proxies, and not offline.

    The Hub's library reads HF_ENDPOINT when it is imported, so each endpoint needs its own process.
    """
    private = ("HF_", "HUGGING", "XDG_", "TRANSFORMERS_", "HTTP", "ALL_PROXY", "http", "all_proxy")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def nobody_there() -> Iterator[str]:
    """An address that refuses connections: its port is taken until the block ends, so that no one begins to listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
