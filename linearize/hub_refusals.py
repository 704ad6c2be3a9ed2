"""What the Hub, or the way to it, says against fetching a model, as cause and remedy."""

from __future__ import annotations

import json
import re

from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from linearize.errors import TeacherError

_LOGIN = "run `hf auth login` (or set HF_TOKEN)"
PASS_FILE = "For a GGUF repository, download the .gguf file and pass its path."
# What the Hub may say about one model: error, problem, remedy. The first match counts: a gated model is also "absent".
_REFUSALS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        hub_errors.GatedRepoError,
        "'{repo}' is gated and this account or token has no access.",
        f"Accept its licence on that page, then {_LOGIN} and try again.",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "the Hub has no model '{repo}', or it is private and this token may not see it.",
        f"Check the name; no local folder is called so. If the model is private, {_LOGIN}.",
    ),
    (
        hub_errors.RevisionNotFoundError,
        "'{repo}' has no revision '{revision}'.",
        "Give a branch, a tag or a whole commit hash; that page lists them.",
    ),
    (hub_errors.RemoteEntryNotFoundError, "'{repo}' has no config.json.", PASS_FILE),
    (hub_errors.HFValidationError, "'{repo}' is no valid Hub id.", "A Hub id has the form owner/name."),
)
# All that a call to the Hub may raise. The HTTP client's base error is taken from the Hub's library, which has changed
# clients between versions; a login page in front of the network answers with something that is not JSON.
HUB_ERRORS = (
    OSError,
    RuntimeError,
    json.JSONDecodeError,
    hub_errors.HTTPError,
    hub_errors.EntryNotFoundError,
    hub_errors.HFValidationError,
    hub_errors.XetDownloadError,
)


def refusal_of(repo: str, revision: str | None, error: Exception) -> TeacherError:
    """Turn an error of the Hub's library into cause and remedy."""
    for kind, problem, remedy in _REFUSALS:
        if isinstance(error, kind):
            said = problem.format(repo=repo, revision=revision or hub_constants.DEFAULT_REVISION)
            return TeacherError(said, place=f"https://huggingface.co/{repo}", remedy=remedy)
    asked = repo if revision is None else f"{repo}@{revision}"
    if hub_constants.HF_HUB_OFFLINE:
        return TeacherError(f"'{asked}' is not in the local Hub cache and HF_HUB_OFFLINE is set.", remedy="Unset it.")
    remedy = "Check network, proxy and HF_ENDPOINT, or pass a folder or a .gguf file as the model."
    cause = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        cause = f"it answered {status}"
        remedy = f"To renew the token, {_LOGIN}." if status in (401, 403) else remedy
    return TeacherError(f"could not fetch '{asked}' from {redact(hub_constants.ENDPOINT)}: {cause}.", remedy=remedy)


def first_line(error: Exception) -> str:
    """The first line of an error, and the second where it only announces that; without full stop and credentials."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    said = f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
    return redact(said).rstrip(".:!")


def redact(text: str) -> str:
    """Drop `user:password@` from addresses; index and proxy settings may hold one."""
    return re.sub(r"//[^/@\s]+@", "//", text)
