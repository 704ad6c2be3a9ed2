"""Put a student on the Hugging Face Hub, through huggingface_hub; say what may stand in the way before anything leaves.

The token is huggingface_hub's own (`hf auth login` or HF_TOKEN): no option takes it, no message and no file shows it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from linearize.card import PLACE, paths_said, without_folders
from linearize.errors import HubError
from linearize.hub_refusals import first_line, redact
from linearize.run_folder import read_json, write_json

UPLOADED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"),
    *("*.py", "recipe.yaml", "*.md", "*.html"),
)
"""What leaves the folder, of its top: not the run with its checkpoints, nothing hidden. And `evals/*.json`."""

TOLD = frozenset(("README.md", "metrics.json", "recipe.yaml"))
"""Of these, and of `evals/*.json`, what tells where files lie on this machine stays here."""

_COMMAND = re.compile(r'"command": ("(?:[^"\\]|\\.)*")')

OPEN_LICENSES = frozenset(
    (
        *("afl-3.0", "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-openrail-m", "bsd", "bsd-2-clause"),
        *("bsd-3-clause", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "ms-pl"),
        *("openrail", "openrail++", "unlicense"),
    )
)
"""Licences that let anyone pass on what was made from a model, some of them under conditions."""

CONDITIONS = {
    "llama2": "its agreement goes along, and its acceptable-use policy holds",
    "llama3": "the name must begin with 'Llama 3', 'Built with Meta Llama 3' must be shown, its agreement goes along",
    "llama3.1": "the name must begin with 'Llama', 'Built with Llama' must be shown, its agreement goes along",
    "llama3.2": "the name must begin with 'Llama', 'Built with Llama' must be shown, its agreement goes along",
    "llama3.3": "the name must begin with 'Llama', 'Built with Llama' must be shown, its agreement goes along",
    "gemma": "its terms and its use restrictions go along",
}
"""Licences of their own that permit derivatives; what they ask. A summary: read the licence."""

NAME = "A name on the Hub has the form owner/name."
LOGIN = "run `hf auth login` or set HF_TOKEN, with a token that may write."
AGAIN = "Repeat the command: files that have arrived are not sent again."


@dataclass(frozen=True)
class Push:
    """What goes where: the options of `linearize push`.

    Attributes:
        folder: a student with its card and metrics, as `convert` leaves it.
        repo: owner/name.
        private: None = private where the teacher is gated, or where that is unknown.
        revision: a branch; None = main.
        accept_license: go on though the teacher's licence is unknown, or may forbid it.
        update: write into a repository that exists.
    """

    folder: Path
    repo: str
    private: bool | None = None
    revision: str | None = None
    accept_license: bool = False
    update: bool = False


def check_account(repo: str) -> None:
    """See that the name is valid and that this account may write there. Sends nothing but the token.

    Raises:
        HubError: invalid name, no token, bad token, no rights, no connection.
    """
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError as error:
        raise HubError(f"{first_line(error)}.", place=repo, remedy=NAME) from None
    if repo.count("/") != 1:
        raise HubError("names no owner.", place=repo, remedy=NAME)
    with _said(repo):
        account = HfApi().whoami()
    owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    if repo.split("/")[0] not in owners:
        raise HubError(
            f"the account '{account['name']}' cannot write there.",
            place=repo,
            remedy=f"It may write to: {', '.join(owners)}. For another account, {LOGIN}",
        )


def push(job: Push, say: Callable[[str], None]) -> str:
    """Upload a student; the address of the commit.

    A push that broke off goes on when it is repeated. A repository that this folder did not make is left alone.

    Raises:
        HubError: no student, a licence to be accepted first, and all that `check_account` and the Hub may refuse.
    """
    metrics = _metrics(job.folder)
    _check_license(job, metrics["teacher"], say)
    check_account(job.repo)
    open_teacher = metrics["teacher"].get("gated") is False  # unknown: of a cached one, in runs before this was noted
    private = not open_teacher if job.private is None else job.private
    with _said(job.repo), tempfile.TemporaryDirectory(prefix="linearize-push-") as work:
        staged = _stage(job, metrics, Path(work))
        _make_repo(job, private)
        say(f"Uploading to {job.repo} ({'private' if private else 'public'}): {', '.join(staged)}.")
        done = HfApi().upload_folder(
            repo_id=job.repo,
            folder_path=work,
            revision=job.revision,
            commit_message="Student made with linearize",
        )
    return str(done.commit_url)


def _metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a whole student."""
    needed = ("config.json", "metrics.json", "README.md", "recipe.yaml")
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        remedy = "Give the --out folder of a finished conversion."
        raise HubError(f"is no finished student: it lacks {', '.join(missing)}.", place=str(folder), remedy=remedy)
    found = read_json(folder / "metrics.json")
    if not isinstance(found.get("teacher"), dict):
        raise HubError(
            "does not name the teacher, and so not its licence.",
            place=str(folder / "metrics.json"),
            remedy="Give the --out folder of a finished conversion.",
        )
    return found


def _check_license(job: Push, teacher: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say what the teacher's licence means for the student, before anything leaves the machine."""
    license_name = teacher.get("license")
    name = None if license_name is None else str(license_name).lower()
    if name in OPEN_LICENSES:
        return
    if name in CONDITIONS:
        say(f"The teacher's licence is {name}: {CONDITIONS[name]}.")
        return
    if name is None:
        problem = f"the licence of the teacher {teacher['name']} is unknown; without one, nobody may pass it on."
    elif "-nd" in name:
        problem = f"the licence of the teacher {teacher['name']}, {name}, forbids derivatives, which the student is."
    else:
        problem = f"the licence of the teacher {teacher['name']}, {name}, is not known to permit derivatives."
    if not job.accept_license:
        remedy = "Nothing was sent. If you have the right to publish it, add --accept-license."
        raise HubError(problem, place=str(job.folder), remedy=remedy)
    say(f"Going on because of --accept-license: {problem}")


def _stage(job: Push, metrics: dict[str, Any], work: Path) -> list[str]:
    """Links to what will be uploaded, and what tells of the run, without local folders; the names.

    The card calls the student by its name on the Hub.
    """
    names = [path.name for path in job.folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in UPLOADED)]
    names += [f"evals/{path.name}" for path in (job.folder / "evals").glob("*.json")]
    names = [name for name in names if not name.startswith(".")]
    told = {name: (job.folder / name).read_text(encoding="utf-8") for name in names if name in TOLD or "/" in name}
    told["README.md"] = told["README.md"].replace(PLACE, job.repo)
    try:
        ModelCard(told["README.md"])
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"its metadata is not valid: {first_line(error)}.", place=str(job.folder / "README.md")
        ) from None
    measured = [json.loads(found) for text in told.values() for found in _COMMAND.findall(text)]
    for name in names:
        (work / name).parent.mkdir(exist_ok=True)
        if name in told:
            text = without_folders(told[name], [*paths_said(metrics), *measured])
            (work / name).write_text(text, encoding="utf-8")
        else:
            os.symlink((job.folder / name).resolve(), work / name)
    return sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())


def _make_repo(job: Push, private: bool) -> None:
    """Create the repository and the branch; go on in one that this folder made before."""
    record = job.folder / "run" / "pushed.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    known = job.update or job.repo in made
    try:
        HfApi().create_repo(job.repo, private=private, exist_ok=known)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        raise HubError(
            "exists already, and was not made from this folder.",
            place=f"{hub_constants.ENDPOINT}/{job.repo}",
            remedy="Choose another name; or write into it with --update, on a branch of its own with --revision.",
        ) from None
    if job.repo not in made:
        record.parent.mkdir(exist_ok=True)
        write_json(record, [*made, job.repo])
    if job.revision is not None:
        HfApi().create_branch(job.repo, branch=job.revision, exist_ok=True)


@contextmanager
def _said(repo: str) -> Iterator[None]:
    """Inside, what the Hub and the network refuse becomes place, cause and remedy, without the token."""
    try:
        yield
    except HubError:
        raise
    except (OSError, RuntimeError, ValueError, hub_errors.HTTPError) as error:
        place = f"{redact(hub_constants.ENDPOINT)}/{repo}"
        problem, remedy = _explain(error)
        raise HubError(without_token(problem), place=place, remedy=remedy) from None


def _explain(error: Exception) -> tuple[str, str]:
    """What the Hub's library or the network said, and what can be done."""
    if isinstance(error, hub_errors.LocalTokenNotFoundError):
        return "there is no token.", f"To write to the Hub, {LOGIN}"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set.", "Unset it."
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # an upload wraps what stopped it
        cause = cause.__cause__
    if not isinstance(cause, hub_errors.HfHubHTTPError):
        return f"the connection broke: {type(cause).__name__}: {first_line(error)}.", AGAIN
    status = cause.response.status_code
    if status == 401:
        return "the Hub does not know this token.", f"To renew it, {LOGIN}"
    if status == 403:
        return "this token may not write there.", f"Give it write access, or {LOGIN}"
    if status == 400:
        return f"the Hub refused: {cause.server_message or first_line(cause)}.", "Change what it names."
    return f"it answered {status}: {first_line(cause)}.", AGAIN


def without_token(text: str) -> str:
    """Text from elsewhere, with the token struck out should it be in there."""
    token = huggingface_hub.get_token()
    return text if not token else text.replace(token, "<token>")
