"""Teacher targets on disk: the k largest logits of every token of a stage, so that the teacher need not run again.

A cache is one folder: `manifest.json` says what it is of (`TargetKey`) and lists the shards with their sha256 and size.
Shard i holds, for micro-batches of the stage in order, `values.N`, `indices.N`, `lse.N` (see `topk.TopK`) and `crc.N`,
a checksum of the tokens they belong to. A shard is written aside and renamed before it is listed, so a writer that was
killed goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from linearize.config import Config
from linearize.errors import RunError
from linearize.run_folder import write_json
from linearize.stages.base import Batch, StageConfig
from linearize.topk import TopK
from linearize.train import Batches

MANIFEST = "manifest.json"
NO_NUMBER = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "quantization_config"}
"""Entries of a configuration that change no logit, or that the weights show."""

SHARD_BYTES = 64 * 2**20
"""A shard holds as many micro-batches as fit, at least one."""


class TargetKey(Config):
    """What targets depend on; a run reads a cache only if all of it is the same.

    Attributes:
        teacher: sha256 of its weights and configuration (`teacher_digest`).
        text: the corpus' fingerprint, which depends on the tokenizer too.
        packing: rows and their order: first token and tokens of the text, seed, and (steps, length, rows) by piece.
        precision: mixed precision of the teacher's forward.
    """

    teacher: str
    text: str
    packing: tuple[int | tuple[int, ...], ...]
    micro_batches: int
    top_k: int
    temperature: float
    precision: str

    def digest(self) -> str:
        """A short name for the folder of such a cache."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def packing_of(config: StageConfig, first_token: int, seed: int) -> tuple[int | tuple[int, ...], ...]:
    """All that decides which tokens lie in which micro-batch, for one corpus."""
    pieces = ((piece.steps * config.accumulation, piece.length, piece.rows) for piece in config.pieces())
    return (first_token, config.tokens, seed, *pieces)


def teacher_digest(model: PreTrainedModel) -> str:
    """sha256 of all weights with their names and dtypes, and of the configuration, which turns and scales positions."""
    said = {name: value for name, value in model.config.to_diff_dict().items() if name not in NO_NUMBER}
    found = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # of shards all must ask
        held = whole.detach().to("cpu", copy=True)  # numpy would lay hold of the weight's own memory for good
        found.update(held.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class CachedRows:
    """Micro-batches with the teacher's targets; made by `open_targets`."""

    folder: Path
    batches: Batches
    per_shard: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        """Raises RunError where the targets are of other tokens: packing changed between versions."""
        batch, path = self.batches[index], self.folder / _shard_name(index // self.per_shard)
        with safe_open(path, "pt") as shard:
            found = {name: shard.get_tensor(f"{name}.{index}") for name in (*TopK._fields, "crc")}
        if found.pop("crc").item() != _crc(batch):
            raise RunError(
                f"the targets of micro-batch {index} belong to other tokens.",
                place=str(path),
                remedy="Write the cache again, in another folder.",
            )
        return replace(batch, teacher=TopK(**found))


def write_targets(
    folder: Path,
    key: TargetKey,
    batches: Batches,
    answer: Callable[[Batch], TopK],
    progress: Callable[[int, int], None],
) -> int:
    """Write what is missing of a cache: all, what a killed writer left, or shards that were lost or altered.

    Args:
        folder: of this cache alone; made if needed.
        key: what it is of.
        batches: the stage's micro-batches, `key.micro_batches` of them.
        answer: the teacher's targets of a micro-batch.
        progress: called with (micro-batches done, of all).

    Returns:
        How many micro-batches were written.

    Raises:
        RunError: the folder holds another cache, another process writes it, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _write_missing(folder, key, batches, answer, progress)
    except (OSError, SafetensorError) as error:  # safetensors has its own word for a full disk
        raise RunError(
            f"the targets cannot be written: {error}",
            place=str(folder),
            remedy="Free space or choose rights, then repeat the command: what is whole is kept.",
        ) from None


def open_targets(folder: Path, key: TargetKey, batches: Batches) -> CachedRows:
    """The stage's micro-batches with their targets from a whole cache; every shard's sha256 is checked.

    Raises:
        RunError: there is no cache, it is of something else (all differences are named), or shards are missing or
            altered.
    """
    manifest = check_targets_of(folder, key)
    per_shard = int(manifest["per_shard"])
    broken = [reason for name in _names(key, per_shard) if (reason := _reason_broken(folder, name, manifest))]
    if broken:
        raise RunError(
            f"{len(broken)} shards cannot be used: {'; '.join(broken[:3])}.",
            place=str(folder),
            remedy="Write them again with `linearize cache-targets` and the same options; what is whole is kept.",
        )
    return CachedRows(folder, batches, per_shard)


def check_targets_of(folder: Path, key: TargetKey) -> dict[str, Any]:
    """The manifest of a cache, which need not be whole.

    Raises:
        RunError: there is no cache, or it is of something else: all differences are named.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise RunError(
            "holds no cached targets",
            place=str(folder),
            remedy="Write them first: `linearize cache-targets` with the same options.",
        )
    _check_key(folder, manifest, key)
    return manifest


def _write_missing(
    folder: Path,
    key: TargetKey,
    batches: Batches,
    answer: Callable[[Batch], TopK],
    progress: Callable[[int, int], None],
) -> int:
    manifest, written = _read_manifest(folder), 0
    if manifest is None:
        first = answer(batches[0])
        size = sum(tensor.numel() * tensor.element_size() for tensor in first)
        manifest = {"format": 1, "key": key.model_dump(mode="json"), "per_shard": max(1, SHARD_BYTES // size)}
        manifest["shards"] = {}
        write_json(folder / MANIFEST, manifest)
    _check_key(folder, manifest, key)
    per_shard = int(manifest["per_shard"])
    for number, name in enumerate(_names(key, per_shard)):
        indices = range(number * per_shard, min((number + 1) * per_shard, key.micro_batches))
        if _reason_broken(folder, name, manifest):
            tensors: dict[str, Tensor] = {}
            for index in indices:
                tensors |= _tensors(index, batches[index], answer)
                progress(index + 1, key.micro_batches)
            aside = folder / f".{name}.tmp"
            save_file(tensors, aside)
            manifest["shards"][name] = _fingerprint(aside)
            os.replace(aside, folder / name)
            write_json(folder / MANIFEST, manifest)
            written += len(indices)
    return written


def _tensors(index: int, batch: Batch, answer: Callable[[Batch], TopK]) -> dict[str, Tensor]:
    named = {**answer(batch)._asdict(), "crc": torch.tensor(_crc(batch))}
    return {f"{name}.{index}": tensor.cpu().contiguous() for name, tensor in named.items()}


def _crc(batch: Batch) -> int:
    return zlib.crc32(batch.position_ids_BT.numpy().tobytes(), zlib.crc32(batch.input_ids_BT.numpy().tobytes()))


def _shard_name(number: int) -> str:
    return f"targets-{number:05d}.safetensors"


def _names(key: TargetKey, per_shard: int) -> list[str]:
    return [_shard_name(number) for number in range(-(-key.micro_batches // per_shard))]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError("another process is writing this cache", place=str(folder)) from None
        yield


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        TargetKey.model_validate(found["key"])
        if not (int(found["per_shard"]) >= 1 and isinstance(found["shards"], dict)):
            raise ValueError(found["per_shard"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            "is no manifest of cached targets, or of another version", place=str(path), remedy="Choose another folder."
        ) from None
    assert isinstance(found, dict)
    return found


def _check_key(folder: Path, manifest: Mapping[str, Any], key: TargetKey) -> None:
    made, asked = TargetKey.model_validate(manifest["key"]).model_dump(), key.model_dump()
    different = [f"{name} (cached {made[name]}, asked {asked[name]})" for name in asked if made[name] != asked[name]]
    if different:
        processes = " Several processes may take fewer rows a micro-batch: cache with that `micro_batch`."
        raise RunError(
            f"these targets are of another {' and another '.join(different)}.",
            place=str(folder),
            remedy="Choose another folder, or the teacher, text and recipe that they were made with."
            + (processes if made["packing"] != asked["packing"] else ""),
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _reason_broken(folder: Path, name: str, manifest: Mapping[str, Any]) -> str | None:
    """Why a shard cannot be used; None if it is whole."""
    expected = manifest["shards"].get(name)
    if expected is None or not (folder / name).is_file():
        return f"{name} is missing"
    found = _fingerprint(folder / name)
    if found["size"] != expected["size"]:
        return f"{name} has {found['size']} bytes instead of {expected['size']}"
    return None if found == expected else f"{name} was altered"
