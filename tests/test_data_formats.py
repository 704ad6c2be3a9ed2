"""Files and Hub data sets as documents. No network: the Hub is a stand-in or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearize.data import default_documents, open_documents, sources
from linearize.errors import DataError


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_format_gives_source_and_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"source": ["wiki", None], "text": ["one", "two"]})
    lines = "\n".join(
        [json.dumps({"text": "thrée\u2028x"}), "", json.dumps({"text": None}), json.dumps({"text": "four"})]
    )
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five", "source": "zip"}\n'))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.md").write_bytes(b"\xef\xbb\xbf# six")
    (tmp_path / "e.txt").write_text("seven")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    documents = open_documents(str(tmp_path), None)
    expected = [
        ("wiki", "one"),
        ("a", "two"),
        ("b", "thrée\u2028x"),
        ("b", "four"),
        ("zip", "five"),
        ("d", "# six"),
        ("e", "seven"),
    ]
    assert list(documents) == expected
    assert list(documents.read(3)) == list(documents.read(3))
    assert sorted(documents.read(3)) == sorted(expected)
    assert not documents.streamed


def test_fingerprint_follows_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_documents(str(path), None).fingerprint
    assert open_documents(str(path), None).fingerprint == first
    path.write_text("two")
    assert open_documents(str(path), None).fingerprint != first


def test_text_field(tmp_path: Path) -> None:
    only = write_parquet(tmp_path / "only.parquet", {"source": ["s"], "body": ["one"], "n": [1]})
    assert list(open_documents(str(only), None)) == [("s", "one")]
    two = write_parquet(tmp_path / "two.parquet", {"question": ["q"], "answer": ["a"], "n": [1]})
    with pytest.raises(DataError, match=r"two\.parquet: no column 'text' and 2 .* columns: question, answer, n"):
        list(open_documents(str(two), None))
    assert list(open_documents(str(two), "answer")) == [("two", "a")]
    dictionary = pa.table({"text": pa.array(["x", "x"]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "dictionary.parquet")
    assert list(open_documents(str(tmp_path / "dictionary.parquet"), None)) == [("dictionary", "x")] * 2


BAD_FILES = {
    "empty.txt": (b"", None, r"empty\.txt: empty"),
    "empty.jsonl": (b"", None, r"empty\.jsonl: empty"),
    "empty.parquet": (b"", None, r"empty\.parquet: cannot be read as parquet"),
    "corrupt.parquet": (b"PAR1 nothing PAR1", None, r"corrupt\.parquet: cannot be read as parquet"),
    "latin.txt": (b"ab\xe9 c", None, r"latin\.txt: not UTF-8 text: byte 0xe9 at byte 2"),
    "latin.md": (b"\xff\xfea", None, r"latin\.md: .* at byte 0"),
    "zero.txt": ("é\0b".encode(), None, r"zero\.txt: a zero byte at byte 2"),
    "latin.jsonl": (b'{"text": "\xe9"}', None, r"latin\.jsonl: not UTF-8 text: .* at byte 10"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": ', None, r"cut\.jsonl, line 2: not JSON"),
    "list.jsonl": (b'["a"]', None, r"list\.jsonl, line 1: got a JSON list"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 3}', None, r"number\.jsonl, line 3: column 'text' holds a int"),
    "lacks.jsonl": (b'{"text": "a"}\n{"body": "b"}', None, r"lacks\.jsonl, line 2: no column 'text'; columns: body"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}', None, r"surrogate\.jsonl, line 1: .* at character 1"),
    "column.jsonl": (b'{"text": "a"}', "body", r"column\.jsonl, line 1: no column 'body'; columns: text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}')[:-9], None, r"cut\.jsonl\.gz: cannot be decompressed"),
    "plain.jsonl.gz": (b'{"text": "a"}', None, r"plain\.jsonl\.gz: cannot be decompressed"),
    "table.csv": (b"text\na\n", None, r"table\.csv: unsupported suffix '\.csv'; supported: \.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    raw, text_field, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        list(open_documents(str(tmp_path / name), text_field))
    assert caught.value.remedy


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a"], "n": [1]})
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; columns: text, n"):
        list(open_documents(str(path), "body"))
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' does not hold text; columns with text: text"):
        list(open_documents(str(path), "n"))
    nulls = write_parquet(tmp_path / "nulls.parquet", {"text": pa.array([None, " "], pa.string())})
    with pytest.raises(DataError, match=r"nulls\.parquet: empty"):
        list(open_documents(str(nulls), None))
    broken = pa.array([b"ok", b"\xff"]).view(pa.string())
    path = write_parquet(tmp_path / "bytes.parquet", {"text": broken})
    with pytest.raises(DataError, match=r"bytes\.parquet, column 'text': not UTF-8 text"):
        list(open_documents(str(path), None))


def test_missing_and_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: no such file or folder"):
        open_documents(str(tmp_path / "nothing.txt"), None)
    with pytest.raises(DataError, match=r"no file here can be read; supported: \.parquet"):
        open_documents(str(tmp_path), None)


# --- the Hub ---------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands in for the two calls that reach the Hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]]) -> None:
        self.calls: list[tuple[object, ...]] = []
        monkeypatch.setattr(sources, "_probe", lambda hub_id: "r3v1s10n")

        def load_dataset(path: str, name: str | None, *, split: str, revision: str, streaming: bool) -> object:
            self.calls.append((path, name, split, revision, streaming))
            return datasets.Dataset.from_list(rows).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"document {i}", "n": i} for i in range(20)]
    hub = FakeHub(monkeypatch, [*rows, {"text": None, "n": 20}])
    documents = open_documents("someone/books:english", None)
    assert hub.calls == [("someone/books", "english", "train", "r3v1s10n", True)]
    assert documents.fingerprint == "someone/books:english@r3v1s10n:text"
    assert documents.streamed
    assert list(documents) == [("books", row["text"]) for row in rows]
    assert list(documents.read(1)) == list(documents.read(1)) != list(documents)
    chosen, why = default_documents("someone/books")
    assert chosen.name == "someone/books"
    assert "the recipe's default" in why


def test_hub_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    FakeHub(monkeypatch, [{"prompt": "q", "prompt_id": "0", "messages": talk}, {"messages": talk[:1]}])
    documents = open_documents("someone/chats", None)
    assert list(documents) == [("chats", (("user", "q"), ("assistant", "a")))]
    FakeHub(monkeypatch, [{"prompt": "q", "answer": "a", "n": 1}])
    with pytest.raises(DataError, match="2 other columns that hold text; columns: prompt, answer, n"):
        open_documents("someone/chats", None)


def test_other_encodings_are_named_with_the_way_out(tmp_path: Path) -> None:
    for name, encoding in {"UTF-16": "utf-16", "LATIN1": "latin-1"}.items():
        (tmp_path / "a.txt").write_bytes("é".encode(encoding))
        with pytest.raises(
            DataError, match=rf"a\.txt: not UTF-8 text: byte 0x.. at byte 0\. .*iconv -f {name} -t UTF-8"
        ):
            list(open_documents(str(tmp_path), None))


def refuse(hub_id: str) -> str:
    raise sources._hub_error(hub_id, ConnectionError("no route"))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_probe", refuse)
    message = r"someone/books: no such file or folder, and as a Hub .*ConnectionError: no route.*--data"
    with pytest.raises(DataError, match=message):
        open_documents("someone/books", None)
    documents, why = default_documents("someone/books")
    assert documents.name.startswith("documentation and sources of Python")
    assert "someone/books" in why
    assert "no route" in why
    documents, why = default_documents(None)
    assert "names no data set" in why


def test_hub_breaks_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows():
        yield {"text": "one"}
        raise OSError("reset by peer")

    monkeypatch.setattr(sources, "_probe", lambda hub_id: "r")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, split, revision, streaming: datasets.IterableDataset.from_generator(rows)
    )
    documents = open_documents("someone/books", None)
    with pytest.raises(DataError, match=r"someone/books: cannot be read from the Hub .*reset by peer"):
        list(documents)


def test_offline_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        open_documents("someone/books", None)
