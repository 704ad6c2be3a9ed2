"""The built-in text, the corpus and packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import linearize.data.corpus as corpus_module
import linearize.data.encoding as encoding_module
import linearize.data.heldout as heldout_module
from linearize.data import Budget, Corpus, Documents, PackedRows, Source, builtin_documents, heldout_from, sources
from linearize.errors import DataError
from linearize.stages.base import Batch
from tests.test_data_formats import write_parquet

EOS = "<eos>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without merges: a token a byte, so that decoding gives the text back; EOS is token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def spell(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> list[str]:
    """The documents that tokens spell; a last one that the budget cut is there too."""
    table = {character: byte for byte, character in _byte_characters().items()}
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    parts = np.split(tokens, ends + 1)
    return [
        bytes(table[vocabulary[i]] for i in part.tolist() if i).decode("utf-8", "replace")
        for part in parts
        if part.size
    ]


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(moved)}}


def texts_as_documents(texts: list[str], source: str = "s", streamed: bool = False) -> Documents:
    entries = [(source, text) for text in texts]
    return Documents("texts", "fingerprint", lambda seed: iter(sources._ordered(entries, seed)), streamed)


def build(
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_tokens: int,
    heldout_tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """A corpus of one source."""
    budget = Budget(train_tokens, heldout_tokens, seed)
    return corpus_module.build_corpus([Source(documents)], tokenizer, budget, progress=progress)


# --- builtin ---------------------------------------------------------------------------------------------------------


def test_builtin_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = builtin_documents()
    assert documents.fingerprint == builtin_documents().fingerprint
    assert {source for source, _ in documents} == {"python_docs", "python_source"}
    corpus = build(documents, tokenizer, train_tokens=100_000, heldout_tokens=20_000, seed=0)
    assert corpus.tokens.size == 100_000
    assert sum(tokens.size for tokens in corpus.heldout.values()) == 20_000


# --- the corpus ------------------------------------------------------------------------------------------------------


def test_corpus_spells_its_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"document {i}: " + "ab é\n" * (i % 7) for i in range(1000)]
    documents = texts_as_documents(texts)
    reports: list[tuple[int, int]] = []
    corpus = build(
        documents, tokenizer, train_tokens=5000, heldout_tokens=100, seed=1, progress=lambda *r: reports.append(r)
    )
    assert corpus.tokens.dtype == np.int32
    assert corpus.tokens.size == 5000
    assert corpus.epochs == 1.0
    spelt = spell(tokenizer, corpus.tokens)
    assert set(spelt[:-1]) <= set(texts)
    ends = np.flatnonzero(corpus.tokens[:-1] == 0)
    assert corpus.document_starts.tolist() == [0, *(ends + 1)]
    assert reports[-1] == (5000, 5000)
    assert reports == sorted(reports)


def test_corpus_is_the_same_for_the_same_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = texts_as_documents([f"document {i} {'x' * (i % 40)}" for i in range(900)])

    def ordered(seed: int, train_tokens: int = 4000) -> Corpus:
        return build(documents, tokenizer, train_tokens=train_tokens, heldout_tokens=50, seed=seed)

    first, again, other = ordered(0), ordered(0), ordered(1)
    assert np.array_equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint
    assert not np.array_equal(first.tokens, other.tokens)
    assert len({first.fingerprint, other.fingerprint, ordered(0, 4001).fingerprint}) == 3
    assert np.array_equal(ordered(0, 6000).tokens[:4000], first.tokens)  # a larger budget goes on where a smaller ended


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), copies=st.integers(1, 3), budget=st.sampled_from([3_000, 60_000]))
def test_heldout_never_trains(tokenizer: PreTrainedTokenizerFast, seed: int, copies: int, budget: int) -> None:
    texts = [f"text number {i}, {i * i}" for i in range(1200)] * copies
    corpus = build(texts_as_documents(texts), tokenizer, train_tokens=budget, heldout_tokens=300, seed=seed)
    held = spell(tokenizer, corpus.heldout["s"])
    trained = set(spell(tokenizer, corpus.tokens)[:-1])  # the budget cuts the last one
    assert len(held) == len(set(held)) > 5
    assert set(held[:-1]) <= set(texts)
    assert not set(held[:-1]) & trained
    assert sum(part.size for part in corpus.heldout.values()) <= 300


def test_sides_do_not_depend_on_seed_or_budget(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = texts_as_documents([f"text number {i}, {i * i}" for i in range(2000)])
    held: set[str] = set()
    trained: set[str] = set()
    for seed, budget in ((0, 1000), (1, 20_000), (2, 60_000)):
        corpus = build(documents, tokenizer, train_tokens=budget, heldout_tokens=10_000, seed=seed)
        held |= set(spell(tokenizer, corpus.heldout["s"]))
        trained |= set(spell(tokenizer, corpus.tokens)[:-1])
    assert 20 <= len(held) <= 60  # 2 % of 2,000
    assert not held & trained


def test_few_documents_are_cut_at_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"word{i}" for i in range(2000))
    documents = texts_as_documents([text, text])  # the copy must not bring the end back
    corpus = build(documents, tokenizer, train_tokens=4 * len(text), heldout_tokens=10_000, seed=0)
    (held,) = spell(tokenizer, corpus.heldout["s"])
    assert text.endswith(held)
    assert 0.045 < len(held) / len(text) < 0.055
    kept = text[: -len(held)]
    assert set(spell(tokenizer, corpus.tokens)[:-1]) == {kept}
    assert corpus.epochs == pytest.approx(4 * len(text) / (2 * (len(kept) + 1)))


def test_a_short_text_is_repeated_in_new_orders(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [chr(97 + i) * (i + 1) for i in range(10)]
    corpus = build(texts_as_documents(texts), tokenizer, train_tokens=1000, heldout_tokens=0, seed=0)
    size = round(1000 / corpus.epochs)
    assert corpus.epochs > 10
    spelt = spell(tokenizer, corpus.tokens)
    passes = [spelt[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len({tuple(one) for one in passes}) > 5
    ends = np.flatnonzero(corpus.tokens[:-1] == 0)
    assert corpus.document_starts.tolist() == [0, *(ends + 1)]
    with pytest.raises(DataError, match=rf"texts: the text has {size} tokens, less than one row of 100"):
        PackedRows(corpus, length=100, rows=1, first_token=0, tokens=1000, seed=0)


def test_long_documents_are_cut_in_pieces_without_a_trace(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_module, "_PIECE", 50)
    monkeypatch.setattr(corpus_module, "_BATCH", 120)
    texts = [f"{i} " + "some words, é and more.\n\n" * i for i in range(1, 12)] + ["x" * 333]
    corpus = build(
        texts_as_documents([*texts, *map(str, range(600))]),
        tokenizer,
        train_tokens=20_000,
        heldout_tokens=0,
        seed=0,
    )
    assert set(texts) <= set(spell(tokenizer, corpus.tokens))


def test_streams_end_the_search_for_heldout_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout_module, "_SCAN", 10_000)
    read = 0

    def endless(seed: int | None):
        nonlocal read
        while True:
            read += 1
            yield "s", f"text number {read}"

    documents = Documents("stream", "f", endless, streamed=True)
    build(documents, tokenizer, train_tokens=1000, heldout_tokens=10**9, seed=0)
    assert 500 < read < 2000


def test_unusable_text_and_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="texts: holds no text to train on"):
        build(texts_as_documents([]), tokenizer, train_tokens=10, heldout_tokens=0, seed=0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="tokenizer: has no end-of-text token"):
        build(texts_as_documents(["a"]), bare, train_tokens=10, heldout_tokens=0, seed=0)


def test_heldout_from(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "h.parquet", {"source": ["a", "b", "a", "a"], "text": ["one", "long " * 50, "two", "three"]}
    )
    heldout = heldout_from(str(path), None, tokenizer, 10)
    assert {source: spell(tokenizer, tokens) for source, tokens in heldout.items()} == {
        "a": ["one", "two", "th"],
        "b": ["long long "],
    }
    with pytest.raises(DataError, match="no such file"):
        heldout_from(str(tmp_path / "none.txt"), None, tokenizer, 10)


# --- packing ---------------------------------------------------------------------------------------------------------


def corpus_of(lengths: list[int]) -> Corpus:
    """Token i is the number i, so that a batch tells where its tokens come from."""
    size = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return Corpus("numbers", "f", np.arange(size, dtype=np.int32), starts, 1.0, {})


def expected_batch(corpus: Corpus, ids_BT: np.ndarray) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Positions, segments and targets, a token at a time."""
    starts = set(corpus.document_starts.tolist())
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    targets: list[list[bool]] = []
    for row in ids_BT.tolist():
        position, segment = -1, 0
        positions.append([])
        segments.append([])
        for column, token in enumerate(row):
            opens = column > 0 and token in starts
            position, segment = (0, segment + 1) if opens else (position + 1, segment)
            positions[-1].append(position)
            segments[-1].append(segment)
        targets.append([a == b for a, b in zip(segments[-1], [*segments[-1][1:], -1], strict=True)])
    return positions, segments, targets


def same(left: Batch, right: Batch) -> bool:
    if left.segments_BT is None or right.segments_BT is None:
        segments = left.segments_BT is right.segments_BT
    else:
        segments = torch.equal(left.segments_BT, right.segments_BT)
    return (
        segments
        and torch.equal(left.input_ids_BT, right.input_ids_BT)
        and torch.equal(left.position_ids_BT, right.position_ids_BT)
        and torch.equal(left.target_mask_BT, right.target_mask_BT)
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(2, 12),
    rows=st.integers(1, 4),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_packing(lengths: list[int], length: int, rows: int, seed: int, data: st.DataObject) -> None:
    needed = length * rows
    lengths = [*lengths, needed]  # enough for one micro-batch
    corpus = corpus_of(lengths)
    first_token = data.draw(st.integers(0, corpus.tokens.size - needed))
    tokens = data.draw(st.integers(needed, corpus.tokens.size - first_token))
    packed = PackedRows(corpus, length=length, rows=rows, first_token=first_token, tokens=tokens, seed=seed)
    assert len(packed) == tokens // length // rows
    batches = list(packed)
    assert len(batches) == len(packed)

    seen = torch.cat([batch.input_ids_BT.flatten() for batch in batches]).numpy()
    assert np.unique(seen).size == seen.size  # nothing twice
    assert seen.min() >= first_token
    assert seen.max() < first_token + tokens
    assert tokens - seen.size < length + needed  # nothing lost but an unfilled row and an unfilled micro-batch

    for batch in batches:
        assert batch.input_ids_BT.shape == (rows, length)
        positions, segments, targets = expected_batch(corpus, batch.input_ids_BT.numpy())
        assert batch.position_ids_BT.tolist() == positions
        assert batch.target_mask_BT.tolist() == targets
        if batch.segments_BT is None:
            assert not np.any(segments)
        else:
            assert batch.segments_BT.tolist() == segments

    again = PackedRows(corpus, length=length, rows=rows, first_token=first_token, tokens=tokens, seed=seed)
    index = data.draw(st.integers(0, len(packed) - 1))
    assert same(again[index], batches[index])  # random access = in order, same seed = same order


def test_every_token_once_when_rows_fit() -> None:
    packed = PackedRows(corpus_of([7, 93, 60]), length=8, rows=2, first_token=0, tokens=160, seed=3)
    seen = torch.cat([batch.input_ids_BT.flatten() for batch in packed])
    assert sorted(seen.tolist()) == list(range(160))
    assert seen.tolist() != list(range(160))
    other = PackedRows(corpus_of([7, 93, 60]), length=8, rows=2, first_token=0, tokens=160, seed=4)
    assert not torch.equal(other[0].input_ids_BT, packed[0].input_ids_BT)
    assert same(packed[-1], packed[len(packed) - 1])
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_no_segments_without_an_inner_boundary() -> None:
    packed = PackedRows(corpus_of([8, 8, 16]), length=8, rows=4, first_token=0, tokens=32, seed=0)
    (batch,) = packed
    assert batch.segments_BT is None
    assert batch.position_ids_BT.tolist() == [list(range(8))] * 4
    assert batch.target_mask_BT[:, :-1].all()
    assert not batch.target_mask_BT[:, -1].any()
    assert batch.input_ids_BT.dtype == batch.position_ids_BT.dtype == torch.int64


def test_too_little_text_to_pack() -> None:
    corpus = corpus_of([50])
    with pytest.raises(DataError, match=r"numbers: 31 tokens, .* 4 rows x 8 tokens needs 32.*--set stages\.N\.length"):
        PackedRows(corpus, length=8, rows=4, first_token=0, tokens=31, seed=0)
    with pytest.raises(DataError, match=r"numbers: 50 tokens, but tokens 20 to 52 are asked for"):
        PackedRows(corpus, length=8, rows=4, first_token=20, tokens=32, seed=0)
