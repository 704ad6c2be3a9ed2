"""Training text that the teacher writes itself: in batches, each of which is on disk when it is done."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from linearize.data.sources import open_documents
from linearize.data.writer import Sampling, Writer, Written
from linearize.errors import DataError, RunError, RunInterrupted
from linearize.fingerprint import pinned
from linearize.machine import Machine, choose_machine
from linearize.run_folder import write_json
from linearize.target_cache import teacher_digest
from linearize.teacher import Teacher, load_teacher

BATCH = {"cpu": 16, "cuda": 512}
"""Documents that are written at one time."""

_BLANK_BATCHES = 3  # after so many batches without a document the teacher is taken not to write any
_KEY = b"linearize"

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_COLUMNS = {
    "source": pa.string(),
    "document": pa.int64(),
    "tokens": pa.int64(),
    "finished": pa.bool_(),
    "teacher": pa.string(),
    "revision": pa.string(),
    "seed": pa.int64(),
    "temperature": pa.float64(),
    "top_p": pa.float64(),
}


@dataclass(frozen=True)
class Generation:
    """What a teacher is to write: the options of `linearize data generate`.

    Attributes:
        model: what `--model` takes.
        out: the parquet file; while it is written, its batches lie in a folder beside it, `<out>.parts`.
        tokens: that the teacher writes in all, at least; the document that reaches the number is the last.
        sampling: how tokens are drawn.
        prompts: text file with a prompt a line, or any text that `--data` takes with a prompt a document.
        chat: conversations instead of texts.
        start: the first token of texts without a prompt; None = the tokenizer's bos token, else its eos token.
        batch: documents at one time; None = by the device, and no more than the tokens are enough for.
        device: None takes a GPU when there is one.
    """

    model: str
    out: Path
    tokens: int
    sampling: Sampling
    prompts: str | None = None
    chat: bool = False
    start: str | None = None
    batch: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Generated:
    """What came of it: the file, its documents, their tokens, and what this call wrote and how fast."""

    out: Path
    documents: int
    tokens: int
    new_tokens: int
    seconds: float


def generate(job: Generation, say: Callable[[str], None], on_step: Callable[[str], None]) -> Generated:
    """Let a teacher write until there are enough tokens, or go on where an interrupted call of the same job ended.

    Document number n is drawn with random numbers of the seed and n. On one machine, interrupted and resumed, a job
    gives the same file as an uninterrupted one; another batch size may round differently and so write other text.

    Args:
        job: what to write.
        say: called with a line for each batch.
        on_step: called with a line for each step of a batch, for a display that overwrites it.

    Raises:
        LinearizeError: for all that the user can mend.
        RunInterrupted: on Ctrl-C; finished batches are kept.
    """
    if job.start is not None and (job.chat or job.prompts is not None):
        raise DataError("is for texts without a prompt.", place="--start", remedy="Leave out --chat and --prompts.")
    if job.out.suffix != ".parquet":
        raise DataError("is a parquet file, and --data goes by its name.", place=f"--out {job.out}", remedy=_NAME_IT)
    machine = choose_machine(job.device, "auto")
    job = _fitted(job, machine)
    prompts = _read_prompts(job.prompts)
    began = _begun(job.out)
    model = pinned(job.model, began) if began.get("model") == job.model else job.model
    if model != job.model:
        say(f"Going on with {model}, the teacher that this text was begun with.")
    teacher = load_teacher(model, dtype=machine.dtype, device=machine.device)
    start = job.start or teacher.tokenizer.bos_token or teacher.tokenizer.eos_token
    identity = _identity(job, teacher, machine, prompts, str(start))
    if (found := _finished(job, identity)) is not None:
        say(f"{job.out} is complete already.")
        return found
    writer = Writer(teacher, job.sampling, prompts, job.chat, str(start), lambda step: on_step(f"step {step + 1}"))
    with _parts_folder(job, identity) as parts:
        try:
            new_tokens, seconds = _write_batches(job, identity, writer, parts, say)
        except KeyboardInterrupt:
            kept = len(list(parts.glob("batch_*.parquet")))
            raise RunInterrupted(f"stopped; {kept} batches are kept in {parts}; the same command goes on") from None
        except torch.OutOfMemoryError as error:
            remedy = f"Lower --batch (is {identity['batch']}) or --length, and delete {parts}."
            raise RunError("the GPU has too little memory for a batch.", place=str(job.out), remedy=remedy) from error
        table = _joined(parts, job.tokens, identity)
        _write_table(table, job.out)
        shutil.rmtree(parts)
    return Generated(job.out, table.num_rows, sum(table["tokens"].to_pylist()), new_tokens, seconds)


def _write_batches(
    job: Generation, identity: Mapping[str, Any], writer: Writer, parts: Path, say: Callable[[str], None]
) -> tuple[int, float]:
    """Write the batches that are missing; the tokens and seconds that took."""
    size = int(identity["batch"])
    tokens = documents = index = new_tokens = blank = 0
    seconds = 0.0
    while tokens < job.tokens:
        file = parts / f"batch_{index:06d}.parquet"
        if not file.exists():
            began = time.perf_counter()
            written = writer.write(range(index * size, (index + 1) * size))
            _write_table(_table(written, identity), file)
            seconds += time.perf_counter() - began
            new_tokens += sum(document.tokens for document in written)
        counts = pq.read_table(file, columns=["tokens"])["tokens"].to_pylist()
        tokens, documents, index = tokens + sum(counts), documents + len(counts), index + 1
        blank = 0 if counts else blank + 1
        if blank == _BLANK_BATCHES:
            raise DataError(
                f"wrote nothing in {blank * size} documents: all were blank, or questions without an end.",
                place=job.model,
                remedy="Give --prompts, another --start, or leave out --chat.",
            )
        rate = new_tokens / seconds if seconds else 0.0
        left = timedelta(seconds=round(max(0, job.tokens - tokens) / rate)) if rate else "?"
        say(f"batch {index}: {documents:,} documents, {tokens:,} of {job.tokens:,} tokens, {rate:,.0f}/s, {left} left")
    return new_tokens, seconds


def _fitted(job: Generation, machine: Machine) -> Generation:
    """The job with its batch. No document is longer than all that is asked for, nor by default is a batch much more."""
    length = min(job.sampling.length, job.tokens)
    batch = job.batch or min(BATCH[machine.device.type], -(-job.tokens // length))
    return replace(job, sampling=job.sampling.model_copy(update={"length": length}), batch=batch)


def _read_prompts(prompts: str | None) -> tuple[str, ...]:
    """A prompt a line of a .txt file, a document of anything else."""
    if prompts is None:
        return ()
    found: list[str] = []
    for _, content in open_documents(prompts, None):
        if not isinstance(content, str):
            raise DataError("holds conversations, not prompts.", place=prompts, remedy="Give text: a prompt a line.")
        found += content.splitlines() if Path(prompts).suffix == ".txt" else [content]
    return tuple(prompt.strip() for prompt in found if prompt.strip())


def _identity(
    job: Generation, teacher: Teacher, machine: Machine, prompts: tuple[str, ...], start: str
) -> dict[str, Any]:
    """What decides the text, and so must be the same when a job goes on."""
    return {
        "teacher": teacher.model.config.name_or_path,
        "revision": teacher.revision or teacher.sha256 or teacher_digest(teacher.model),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest() if prompts else None,
        "chat": job.chat,
        "start": None if job.chat or prompts else start,
        **job.sampling.model_dump(),
        "batch": job.batch,
        "precision": machine.precision,
    }


def _finished(job: Generation, identity: Mapping[str, Any]) -> Generated | None:
    """The file, when it is this job's; None when there is none.

    Raises:
        RunError: there is a file of something else.
    """
    if not job.out.exists():
        return None
    try:
        found = pq.read_table(job.out, columns=["tokens"])
        wrote = json.loads((found.schema.metadata or {}).get(_KEY, b"{}"))
        tokens = sum(found["tokens"].to_pylist())
    except (pa.ArrowException, OSError, KeyError, ValueError):
        wrote, tokens = {}, 0
    if wrote == identity and tokens >= job.tokens:
        return Generated(job.out, found.num_rows, tokens, 0, 0.0)
    raise RunError("exists already, and is not what this command writes.", place=str(job.out), remedy=_OTHER_OUT)


_NAME_IT = "Let its name end in .parquet."
_OTHER_OUT = "Choose another --out, or delete it."


def _parts_of(out: Path) -> tuple[Path, Path]:
    """The folder of finished batches, and the file in it that says what they are of."""
    parts = out.with_name(f"{out.name}.parts")
    return parts, parts / "job.json"


def _begun(out: Path) -> dict[str, Any]:
    """The job whose batches are there: its model and its identity; empty where there are none."""
    _, about = _parts_of(out)
    found: dict[str, Any] = json.loads(about.read_text("utf-8")) if about.is_file() else {}
    return found


@contextmanager
def _parts_folder(job: Generation, identity: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of finished batches, held for this process alone.

    Raises:
        RunError: another process writes there, another job did, or it cannot be written.
    """
    parts, about = _parts_of(job.out)
    try:
        parts.mkdir(parents=True, exist_ok=True)
        lock = (parts / ".lock").open("w")
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror or error}.", place=str(parts)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError("another process is writing it.", place=str(job.out)) from None
        began = _begun(job.out) or identity
        different = [
            f"{name} (was {began.get(name)!r}, is {value!r})"
            for name, value in identity.items()
            if began.get(name) != value
        ]
        if different:
            remedy = "Repeat its own command, choose another --out, or delete the folder."
            raise RunError(f"was begun with another {', another '.join(different)}.", place=str(parts), remedy=remedy)
        write_json(about, {**identity, "model": job.model})
        yield parts


def _table(written: list[Written], identity: Mapping[str, Any]) -> pa.Table:
    """Documents as rows: `text` or `messages`, and where they come from."""
    constant = {name: identity[name] for name in ("teacher", "revision", "seed", "temperature", "top_p")}
    rows = [
        {
            "source": f"written by {identity['teacher']}",
            "document": document.number,
            "tokens": document.tokens,
            "finished": document.finished,
            **constant,
            "text": document.content,
            "messages": document.content
            if isinstance(document.content, str)
            else [message._asdict() for message in document.content],
        }
        for document in written
    ]
    content = {"messages": pa.list_(_MESSAGE)} if identity["chat"] else {"text": pa.string()}
    return pa.Table.from_pylist(rows, schema=pa.schema({**content, **_COLUMNS}))


def _joined(parts: Path, tokens: int, identity: Mapping[str, Any]) -> pa.Table:
    """All batches as one table, up to the document that reaches the number of tokens."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(parts.glob("batch_*.parquet"))])
    total = 0
    rows = table.num_rows
    for index, count in enumerate(table["tokens"].to_pylist()):
        total += count
        if total >= tokens:
            rows = index + 1
            break
    return table.slice(0, rows).replace_schema_metadata({_KEY: json.dumps(identity).encode()})


def _write_table(table: pa.Table, file: Path) -> None:
    """Whole or not at all."""
    aside = file.with_name(f".{file.name}.tmp")
    try:
        pq.write_table(table, aside)
        os.replace(aside, file)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror or error}.", place=str(file)) from error
