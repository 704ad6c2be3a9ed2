"""Corpora on disk, so that the same text is tokenised once: one folder each, memory-mapped when it is used again.

A folder's name is the corpus's fingerprint: other text, another tokenizer or another budget has another name. Folders
appear whole, by renaming, so two processes may build the same one: the first to finish is kept, and both go on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.corpus import Budget, Corpus, Part, Progress, build_corpus, corpus_fingerprint
from linearize.data.mixture import Source
from linearize.data.strips import Tokens
from linearize.paths import cache_folder

_ABOUT = "corpus.json"
_BUILDING = ".building-"
_STALE = 24 * 3600  # seconds after which a folder that is still being built is one that a killed process left


@dataclass(frozen=True)
class Entry:
    """One corpus on disk."""

    folder: Path
    name: str
    tokens: int
    bytes: int
    used: float  # seconds since the epoch


def corpora_folder() -> Path:
    """Where corpora lie; not created here."""
    return cache_folder() / "corpora"


def load_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    against: Mapping[str, Tokens] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Corpus:
    """What `build_corpus` gives, from the cache when it was built before.

    Raises:
        DataError: as `build_corpus`, when it has to be built.
    """
    folder = corpora_folder() / corpus_fingerprint(sources, tokenizer, budget, against)
    if folder.is_dir():
        try:
            corpus = _read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"Tokens in {folder} cannot be used ({_first_line(error)}); building them again.")
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"Tokens from the cache: {folder}.")
            return corpus
    corpus = build_corpus(sources, tokenizer, budget, against, progress)
    try:
        _write(corpus, folder)
    except OSError as error:
        say(f"Tokens are not kept for the next run: {folder.parent} cannot be written ({_first_line(error)}).")
    return corpus


def cached_corpora() -> list[Entry]:
    """All corpora on disk, the last used first."""
    entries = []
    for about in corpora_folder().glob(f"[!.]*/{_ABOUT}"):
        with suppress(OSError, ValueError, KeyError):  # deleted meanwhile, or damaged: `clear_corpora` removes it
            facts = json.loads(about.read_text("utf-8"))
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            entries.append(Entry(about.parent, facts["name"], facts["size"], size, about.stat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def clear_corpora() -> int:
    """Delete all corpora; returns the bytes that they took. A run that uses one keeps what it has mapped."""
    folder = corpora_folder()
    if not folder.is_dir():
        return 0
    freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return freed


def _read(folder: Path) -> Corpus:
    facts: dict[str, Any] = json.loads((folder / _ABOUT).read_text("utf-8"))
    os.utime(folder / _ABOUT)

    def array(name: str) -> Any:
        found = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if found.size != facts["sizes"][name]:
            raise ValueError(f"{name}.npy has {found.size} items, not {facts['sizes'][name]}")
        return found

    return Corpus(
        name=facts["name"],
        fingerprint=folder.name,
        tokens=array("tokens"),
        document_starts=array("document_starts"),
        epochs=facts["epochs"],
        heldout={source: np.array(array(f"heldout{index}")) for index, source in enumerate(facts["heldout"])},
        targets=array("targets") if "targets" in facts["sizes"] else None,
        labels=tuple(facts["labels"]),
        document_labels=array("document_labels"),
        parts=tuple(Part(*part) for part in facts["parts"]),
    )


def _write(corpus: Corpus, folder: Path) -> None:
    """Into a folder of its own beside the others, which is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    arrays: dict[str, Any] = {
        "tokens": corpus.tokens,
        "document_starts": corpus.document_starts,
        "targets": corpus.targets,
    }
    arrays |= {"document_labels": corpus.document_labels}
    arrays |= {f"heldout{index}": tokens for index, tokens in enumerate(corpus.heldout.values())}
    present = {name: array for name, array in arrays.items() if array is not None}
    facts = {
        "name": corpus.name,
        "size": int(corpus.tokens.size),
        "epochs": corpus.epochs,
        "heldout": list(corpus.heldout),
        "labels": corpus.labels,
        "parts": corpus.parts,
        "sizes": {name: int(array.size) for name, array in present.items()},
    }
    work = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent))
    try:
        for name, array in present.items():
            np.save(work / f"{name}.npy", array, allow_pickle=False)
        (work / _ABOUT).write_text(json.dumps(facts), encoding="utf-8")
        with suppress(OSError):  # another process was faster: its folder has the same content
            os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for work in parent.glob(f"{_BUILDING}*"):
        with suppress(OSError):
            if time.time() - work.stat().st_mtime > _STALE:
                shutil.rmtree(work, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
