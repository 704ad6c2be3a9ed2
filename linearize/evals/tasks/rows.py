"""Multiple-choice tasks and last-word tasks from local files: `NAME.jsonl` or `NAME.jsonl.gz`, one row a choice.

A row has `doc_id`, `idx`, `context`, `continuation` and `label`: the number of the right choice, or, for a task of one
continuation such as LAMBADA, anything.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import DataError, unknown_name

SUFFIXES = (".jsonl", ".jsonl.gz")
_KEYS = ("doc_id", "idx", "context", "continuation", "label")


@dataclass(frozen=True)
class Document:
    """One question: pairs of context and continuation, and the number of the right pair."""

    pairs: tuple[tuple[str, str], ...]
    label: int


@dataclass(frozen=True)
class LocalTask:
    """The documents of a task, in the order of the file."""

    name: str
    documents: tuple[Document, ...]

    @property
    def choices(self) -> bool:
        """Whether documents have choices; else a continuation is to be predicted."""
        return len(self.documents[0].pairs) > 1

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; None without choices."""
        if not self.choices:
            return None
        return sum(1 / len(document.pairs) for document in self.documents) / len(self.documents)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.documents).encode()).hexdigest()[:16]


def read_tasks(folder: Path, names: Sequence[str] | None, limit: int | None) -> list[LocalTask]:
    """The tasks of a folder.

    Args:
        folder: holds the files.
        names: which of them; None = all.
        limit: the first so many documents of each.

    Raises:
        DataError: no folder, no such task, or a file that is no task.
    """
    if not folder.is_dir():
        raise DataError("is no folder", place=str(folder), remedy="Give --tasks-dir a folder of jsonl files.")
    files = {path.name.removesuffix(suffix): path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))}
    if not files:
        raise DataError(f"holds no {' or '.join(SUFFIXES)} file", place=str(folder))
    for name in names or ():
        if name not in files:
            raise DataError(unknown_name("task", name, files), place=str(folder))
    return [_read(name, files[name], limit) for name in names or files]


def _read(name: str, path: Path, limit: int | None) -> LocalTask:
    documents: list[Document] = []
    group: list[dict[str, Any]] = []
    for row in [*_rows(path), None]:
        if group and (row is None or row["doc_id"] != group[0]["doc_id"]):
            documents.append(_document(group, path))
            group = []
            if len(documents) == limit:
                break
        if row is not None:
            group.append(row)
    if not documents:
        raise DataError("holds no rows", place=str(path))
    return LocalTask(name, tuple(documents))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(raw.decode("utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            missing = [key for key in _KEYS if key not in row]
            if missing:
                raise DataError(f"line {number} has no {', '.join(missing)}", place=str(path), remedy=f"Keys: {_KEYS}.")
            yield row
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot be read: {error}", place=str(path)) from None


def _document(group: list[dict[str, Any]], path: Path) -> Document:
    group = sorted(group, key=lambda row: row["idx"])
    label = group[0]["label"] if len(group) > 1 else 0
    if not isinstance(label, int) or not 0 <= label < len(group):
        raise DataError(
            f"doc_id {group[0]['doc_id']}: label {label!r} is none of {len(group)} choices", place=str(path)
        )
    return Document(tuple((row["context"], row["continuation"]) for row in group), label)
