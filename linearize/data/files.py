"""Read one local file into documents: parquet, JSON lines, plain text, Markdown."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from linearize.errors import DataError

Document = tuple[str, str]
"""(source name, text)."""

SOURCE_FIELD = "source"


def choose_text_field(strings: Iterable[str], columns: Iterable[str], wanted: str | None, place: str) -> str:
    """The column that holds the text: `wanted`, else `text`, else the only string column besides `source`.

    Args:
        strings: the columns that hold strings.
        columns: all columns, for the error.

    Raises:
        DataError: the wanted column is missing or holds no strings, or there is no single candidate.
    """
    strings, columns = list(strings), list(columns)
    listed = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted not in columns:
            problem = f"no column '{wanted}'; columns: {listed}."
        elif wanted not in strings:
            problem = f"column '{wanted}' does not hold text; columns with text: {', '.join(strings) or 'none'}."
        else:
            return wanted
        raise DataError(problem, place=place, remedy="Name a column that holds text with --text-field.")
    if "text" in strings:
        return "text"
    candidates = [name for name in strings if name != SOURCE_FIELD]
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"no column 'text' and {len(candidates)} other columns that hold text; columns: {listed}.",
        place=place,
        remedy="Name the column that holds the text with --text-field.",
    )


def source_of(row: Mapping[str, object], default: str) -> str:
    """The row's `source` when it has one, else `default`."""
    source = row.get(SOURCE_FIELD)
    return default if source is None or source == "" else str(source)


def _holds_strings(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)


def _read_parquet(path: Path, text_field: str | None) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [field.name for field in schema if _holds_strings(field.type)]
            name = choose_text_field(strings, schema.names, text_field, str(path))
            wanted = [name, SOURCE_FIELD] if SOURCE_FIELD in schema.names and name != SOURCE_FIELD else [name]
            table = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read as parquet ({_first_line(error)}).",
            place=str(path),
            remedy="The file may be incomplete: copy or download it again.",
        ) from error
    try:
        for part in table.to_batches(max_chunksize=1024):
            for row in part.to_pylist():
                if row[name] is not None:
                    yield source_of(row, path.stem), row[name]
    except UnicodeDecodeError as error:  # parquet marks a column as text without checking it
        raise _undecodable(f"{path}, column '{name}'", error) from error


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
            strings = [key for key, value in row.items() if isinstance(value, str)]
            name, chosen = choose_text_field(strings, row, text_field, place), True
        assert name is not None
        text = _text_of(row, name, place)
        if text is not None:
            yield source_of(row, stem), text


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


def _text_of(row: dict[str, object], name: str, place: str) -> str | None:
    if name not in row:
        raise DataError(
            f"no column '{name}'; columns: {', '.join(row) or 'none'}.",
            place=place,
            remedy="Every line needs it; null is allowed.",
        )
    text = row[name]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(
            f"column '{name}' holds a {type(text).__name__}.", place=place, remedy="It must hold text or null."
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            raise DataError(
                f"column '{name}' has half a surrogate pair at character {error.start}.",
                place=place,
                remedy="Repair or drop the line.",
            ) from error
    return text


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
    return DataError(
        f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at byte {error.start}.",
        place=place,
        remedy="Give text encoded as UTF-8.",
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
    """Yield the documents of one file whose text is not blank; rows without text are left out.

    Args:
        path: a file with one of the suffixes of READERS.
        text_field: column of the text (`choose_text_field`); plain text and Markdown have none.

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
        for source, text in READERS[suffix](path, text_field):
            if text.strip():
                yield source, text
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", place=str(path)) from error
