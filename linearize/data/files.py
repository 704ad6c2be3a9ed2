"""Read one local file into documents, which are texts or conversations: parquet, JSON lines, plain text, Markdown."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from linearize.data.chat import Conversation, parse_conversation
from linearize.errors import DataError

Content = str | Conversation

Document = tuple[str, Content]
"""(source name, text or conversation)."""

Kind = Literal["text", "chat", "other"]
"""What a column holds."""

SOURCE_FIELD = "source"
CHAT_FIELDS = ("messages", "conversations")
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""How a file may begin that is not UTF-8 -> its encoding. Without a mark, Latin-1 is the likeliest."""


def choose_field(columns: Mapping[str, Kind], wanted: str | None, place: str) -> str:
    """The column to learn from: `wanted`, else `text`, else conversations, else the only text column besides `source`.

    Args:
        columns: all columns, and what each holds.
        wanted: a column that must be taken.
        place: for the error.

    Raises:
        DataError: the wanted column is missing or holds neither text nor conversations, or there is no single
            candidate.
    """
    listed = ", ".join(columns) or "none"
    usable = [name for name, kind in columns.items() if kind != "other"]
    if wanted is not None:
        if wanted not in columns:
            problem = f"no column '{wanted}'; columns: {listed}."
        elif wanted not in usable:
            problem = f"column '{wanted}' does not hold text; columns with text: {', '.join(usable) or 'none'}."
        else:
            return wanted
        raise DataError(problem, place=place, remedy="Name a column that holds text with --text-field.")
    if columns.get("text") == "text":
        return "text"
    for name in CHAT_FIELDS:
        if columns.get(name) == "chat":
            return name
    candidates = [name for name in usable if name != SOURCE_FIELD]
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"no column 'text' and {len(candidates)} other columns that hold text; columns: {listed}.",
        place=place,
        remedy="Name the column that holds the text with --text-field.",
    )


def kind_of(value: object) -> Kind:
    """What a column holds, by one of its values."""
    if isinstance(value, str):
        return "text"
    return "chat" if isinstance(value, list) and value and isinstance(value[0], dict) else "other"


def source_of(row: Mapping[str, object], default: str) -> str:
    """The row's `source` when it has one, else `default`."""
    source = row.get(SOURCE_FIELD)
    return default if source is None or source == "" else str(source)


def _arrow_kind(kind: pa.DataType) -> Kind:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value):
        return "text"
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return "chat" if listed and pa.types.is_struct(kind.value_type) else "other"


def _read_parquet(path: Path, text_field: str | None) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            name = choose_field({field.name: _arrow_kind(field.type) for field in schema}, text_field, str(path))
            wanted = [name, SOURCE_FIELD] if SOURCE_FIELD in schema.names and name != SOURCE_FIELD else [name]
            rows = (row for part in file.iter_batches(1024, columns=wanted) for row in part.to_pylist())
            for number, row in enumerate(rows, start=1):
                content = content_of(row, name, f"{path}, row {number}")
                if content is not None:
                    yield source_of(row, path.stem), content
    except UnicodeDecodeError as error:  # parquet marks a column as text without checking it
        raise _undecodable(f"{path}, column '{name}'", error) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read as parquet ({_first_line(error)}).",
            place=str(path),
            remedy="The file may be incomplete: copy or download it again.",
        ) from error


def _read_text(path: Path, text_field: str | None) -> Iterator[Document]:
    text = _decode(path.read_bytes(), str(path))
    if "\0" in text:
        position = len(text[: text.index("\0")].encode())
        raise DataError(
            f"a zero byte at byte {position}: this is not a text file.",
            place=str(path),
            remedy="Give a UTF-8 text file.",
        )
    yield path.stem, text


def _read_jsonl(path: Path, text_field: str | None) -> Iterator[Document]:
    raw = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    name = text_field
    chosen = False
    for number, line in enumerate(_decode(raw, str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        row = _parse_row(line, place)
        if not chosen:
            kinds = {key: kind_of(value) for key, value in row.items()}
            name, chosen = choose_field(kinds, text_field, place), True
        assert name is not None
        content = content_of(row, name, place)
        if content is not None:
            yield source_of(row, stem), content


def _parse_row(line: str, place: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"not JSON ({_first_line(error)}).", place=place, remedy="A .jsonl file has one JSON object a line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"got a JSON {type(row).__name__}.", place=place, remedy="A .jsonl file has one JSON object a line."
        )
    return row


def content_of(row: Mapping[str, object], name: str, place: str) -> Content | None:
    """The text or conversation of a row; None where there is none.

    Raises:
        DataError: the column is missing, or holds something else.
    """
    if name not in row:
        raise DataError(
            f"no column '{name}'; columns: {', '.join(row) or 'none'}.",
            place=place,
            remedy="Every line needs it; null is allowed.",
        )
    value = row[name]
    if isinstance(value, list):
        conversation = parse_conversation(value, f"{place}, column '{name}'")
        for message in conversation or ():
            _check_spelling(message.content, name, place)
        return conversation
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"column '{name}' holds a {type(value).__name__}.",
            place=place,
            remedy="It must hold text, a conversation or null.",
        )
    _check_spelling(value, name, place)
    return value if value.strip() else None


def _check_spelling(text: str, name: str, place: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise DataError(
            f"column '{name}' has half a surrogate pair at character {error.start}.",
            place=place,
            remedy="Repair or drop the line.",
        ) from error


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot be decompressed ({_first_line(error)}).",
            place=str(path),
            remedy="The file may be incomplete: copy or download it again.",
        ) from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _undecodable(place, error) from error


def _undecodable(place: str, error: UnicodeDecodeError) -> DataError:
    encoding = next((name for mark, name in _OTHER_MARKS.items() if error.object.startswith(mark)), "LATIN1")
    return DataError(
        f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at byte {error.start}.",
        place=place,
        remedy=f"Convert it first: iconv -f {encoding} -t UTF-8 OLD > NEW (with the encoding it was written in).",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


READERS: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".txt": _read_text,
    ".md": _read_text,
}


def supported_suffix(path: Path) -> str | None:
    """The key of READERS that `path` ends with, or None."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_file(path: Path, text_field: str | None) -> Iterator[Document]:
    """Yield the documents of one file; rows without text, and conversations without a reply, are left out.

    Args:
        path: a file with one of the suffixes of READERS.
        text_field: column of the text (`choose_field`); plain text and Markdown have none.

    Raises:
        DataError: the file cannot be read or decoded, a row is malformed, or the column is missing.
    """
    suffix = supported_suffix(path)
    if suffix is None:
        raise DataError(
            f"unsupported suffix '{path.suffix}'; supported: {', '.join(READERS)}.",
            place=str(path),
            remedy="Convert the file to one of these.",
        )
    try:
        for source, content in READERS[suffix](path, text_field):
            if not isinstance(content, str) or content.strip():
                yield source, content
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", place=str(path)) from error
