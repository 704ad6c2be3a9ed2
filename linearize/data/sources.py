"""Where text comes from: local files, the Hugging Face Hub, or this machine's own Python documentation."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from linearize.data.files import (
    READERS,
    Document,
    choose_field,
    content_of,
    kind_of,
    read_file,
    source_of,
    supported_suffix,
)
from linearize.errors import DataError

_T = TypeVar("_T")
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?")
_PROBE_SECONDS = 5.0
_SHUFFLE_BUFFER = 1000  # documents; a Hub stream also shuffles its shards
_NOT_SOURCES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
    "__pycache__",
}


@dataclass(frozen=True)
class Documents:
    """Named documents, texts or conversations, that can be read any number of times.

    Attributes:
        name: where they come from, for people.
        fingerprint: changes when the text changes.
        read: yields (source name, content); in stored order for None, else in the order of that seed. The first call
            may raise DataError for what is wrong with the text.
        streamed: True when they come over the network and their number is not known.
    """

    name: str
    fingerprint: str
    read: Callable[[int | None], Iterator[Document]]
    streamed: bool = False

    def __iter__(self) -> Iterator[Document]:
        return self.read(None)


def open_documents(data: str, text_field: str | None) -> Documents:
    """Open a file, a folder (recursive, sorted) or a Hub data set (`owner/name` or `owner/name:config`).

    Local files are hashed now, and read whole and held in memory when the documents are first read: a fault in any of
    them is reported before the first document comes. A Hub data set is streamed: its `train` split.

    Args:
        data: path or Hub id. An existing path wins over a Hub id of the same name.
        text_field: column that holds the text; None = `text`, else conversations, else the only string column.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    path = Path(data).expanduser()
    if path.exists():
        return _local_documents(path, text_field)
    match = _HUB_ID.fullmatch(data)
    if match is None or supported_suffix(path):
        raise _nowhere(data)
    try:
        return _hub_documents(match["id"], match["config"], text_field)
    except DataError as error:
        problem = f"no such file or folder, and as a Hub data set: {error.problem}"
        raise DataError(problem, place=data, remedy=error.remedy) from error


def check_documents(data: str, text_field: str | None) -> None:
    """Refuse local text of which nothing can be read, by its first document. Asks the Hub nothing, hashes nothing.

    Raises:
        DataError: as `open_documents`; what is wrong further on is found later.
    """
    path = Path(data).expanduser()
    if path.exists():
        _first_document(path, text_field)
    elif _HUB_ID.fullmatch(data) is None or supported_suffix(path):
        raise _nowhere(data)


def _first_document(path: Path, text_field: str | None) -> None:
    found = (document for file in _files_of(path) for document in read_file(file, text_field))
    if next(found, None) is None:
        raise _empty(path)


def default_documents(hub_id: str | None) -> tuple[Documents, str]:
    """A recipe's default text when the Hub has it, else `builtin_documents`; and one sentence on which and why.

    One quick request decides; HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
    """
    if hub_id is None:
        documents, reason = builtin_documents(), "the recipe names no data set"
        return documents, f"Training text: {documents.name}, because {reason}."
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise DataError(f"'{hub_id}' is not a Hub data set id.", place="data", remedy="Write owner/name.")
    try:
        documents = _hub_documents(match["id"], match["config"], None)
    except DataError as error:
        documents = builtin_documents()
        return documents, f"Training text: {documents.name}, because {hub_id}: {error.problem}"
    return documents, f"Training text: {documents.name}, the recipe's default."


def builtin_documents() -> Documents:
    """Python's own documentation (pydoc topics) and standard-library sources of this machine, without tests.

    Files are read when they are reached, so that a small budget reads little; undecodable ones are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in _walk(root) if path.suffix == ".py")
    if not files:
        raise DataError(
            "this Python has no standard-library sources.", place=str(root), remedy="Give text with --data."
        )
    digest = hashlib.sha256(platform.python_version().encode())
    for path in files:
        digest.update(f"{path.relative_to(root)}:{path.stat().st_size}\n".encode())
    entries: list[tuple[str, str | Path]] = [("python_docs", topics[name]) for name in sorted(topics)]
    entries += [("python_source", path) for path in files]

    def read(seed: int | None) -> Iterator[Document]:
        for source, entry in _ordered(entries, seed):
            text = entry if isinstance(entry, str) else _read_or_none(entry)
            if text is not None and text.strip():
                yield source, text

    name = f"documentation and sources of Python {platform.python_version()}"
    return Documents(name, f"python:{digest.hexdigest()}", read)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_SOURCES and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _read_or_none(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a few sources are Latin-1 on purpose
        return None


def _ordered(items: list[_T], seed: int | None) -> list[_T]:
    return items if seed is None else random.Random(seed).sample(items, len(items))


def _nowhere(data: str) -> DataError:
    remedy = "Give a file, a folder or a Hub data set (owner/name)."
    return DataError("no such file or folder.", place=data, remedy=remedy)


def _empty(path: Path) -> DataError:
    return DataError("empty: there is no text in it.", place=str(path), remedy="Give a file that holds text.")


def _files_of(path: Path) -> list[Path]:
    """A file itself; of a folder, all that can be read.

    Raises:
        DataError: there are none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in _visible_files(path) if supported_suffix(file))
    if not files:
        raise DataError(
            f"no file here can be read; supported: {', '.join(READERS)}.",
            place=str(path),
            remedy="Give a folder with text files.",
        )
    return files


def _local_documents(path: Path, text_field: str | None) -> Documents:
    files = _files_of(path)
    digest = hashlib.sha256((text_field or "").encode())
    for file in files:
        digest.update(f"\n{file.name}:".encode())  # a document's source may be its file's name
        digest.update(_file_digest(file))

    @functools.cache
    def load() -> list[Document]:
        documents = [document for file in files for document in read_file(file, text_field)]
        if not documents:
            raise _empty(path)
        return documents

    def read(seed: int | None) -> Iterator[Document]:
        return iter(_ordered(load(), seed))

    return Documents(str(path), f"files:{digest.hexdigest()}", read)


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", place=str(path)) from error


def _visible_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _hub_documents(hub_id: str, config: str | None, text_field: str | None) -> Documents:
    place = f"{hub_id}:{config}" if config else hub_id
    revision = _probe(hub_id)
    # Imported late: it takes a second, and local text does without it.
    from datasets import load_dataset

    try:
        stream = load_dataset(hub_id, config, split="train", revision=revision, streaming=True)
        first = next(iter(stream), None)
    except Exception as error:  # whatever a data set's files and the HTTP library raise
        raise _hub_error(place, error) from error
    if first is None:
        raise DataError("empty: its train split has no rows.", place=place, remedy="Give another data set.")
    field = choose_field({name: kind_of(value) for name, value in first.items()}, text_field, place)

    def read(seed: int | None) -> Iterator[Document]:
        ordered = stream if seed is None else stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        rows: Iterator[dict[str, Any]] = iter(ordered)
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:  # the connection may break at any row
                raise _hub_error(place, error) from error
            if row is None:
                return
            content = content_of(row, field, f"{place}, row {number}")
            if content is not None:
                yield source_of(row, hub_id.split("/")[-1]), content

    return Documents(place, f"{place}@{revision}:{field}", read, streamed=True)


def _probe(hub_id: str) -> str | None:
    """Ask the Hub once for the data set's current revision."""
    try:
        return HfApi().dataset_info(hub_id, timeout=_PROBE_SECONDS).sha
    except Exception as error:  # the HTTP library, and with it the errors, differ between huggingface_hub versions
        raise _hub_error(hub_id, error) from error


def _hub_error(place: str, error: Exception) -> DataError:
    if isinstance(error, GatedRepoError):
        problem, remedy = "the data set is gated.", "Accept its terms on the Hub, then `hf auth login`."
    elif isinstance(error, RepositoryNotFoundError):
        problem, remedy = "the Hub has no such public data set.", "Check the name; `hf auth login` for a private one."
    elif isinstance(error, OfflineModeIsEnabled):
        problem, remedy = "the Hub is switched off by HF_HUB_OFFLINE.", "Unset it, or give local text with --data."
    else:
        reason = (str(error).splitlines() or [""])[0]
        problem = f"cannot be read from the Hub ({type(error).__name__}: {reason})."
        remedy = "Check the connection, HF_ENDPOINT and the name, or give local text with --data."
    return DataError(problem, place=place, remedy=remedy)
