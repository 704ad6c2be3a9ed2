"""Mixtures, the token cache and overlap with held-out text. No network."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linearize.data import (
    Budget,
    Documents,
    PackedRows,
    Source,
    build_corpus,
    cache,
    choose_sources,
    heldout_from,
    load_corpus,
)
from linearize.data.overlap import measure_overlap
from linearize.errors import DataError, RecipeError
from linearize.recipe import load_recipe

EOS = "<eos>"
PLAIN_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte; EOS is token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([EOS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=template)


def word_tokenizer(words: int = 200) -> PreTrainedTokenizerFast:
    """A token a word `w0`, `w1`, …, or its capitals."""
    names = [f"{letter}{index}" for index in range(words) for letter in "wW"]
    vocabulary = {token: index for index, token in enumerate([EOS, ".", *names])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def documents_of(contents: list[object], name: str = "s") -> Documents:
    def read(seed: int | None):
        order = range(len(contents)) if seed is None else np.random.default_rng(seed).permutation(len(contents))
        return iter([(name, contents[i]) for i in order])

    return Documents(name, f"{name}-{len(contents)}", read)


def nothing_held_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("linearize.data.heldout._FEW_DOCUMENTS", 0)  # a few documents would be cut at their ends
    patch.setattr("linearize.data.heldout._PER_MILLE", 0)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_data_options_carry_weights(tmp_path: Path) -> None:
    (tmp_path / "a=2.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    sources, said = choose_sources([str(tmp_path / "a=2.txt"), f"{tmp_path / 'b.txt'}=0.25"], None, None)
    assert [(source.documents.name, source.weight) for source in sources] == [
        (str(tmp_path / "a=2.txt"), 1.0),
        (str(tmp_path / "b.txt"), 0.25),
    ]
    assert "a=2.txt (0.8 of the tokens)" in said
    for wrong in ("-1", "0", "inf", "much", "nan"):
        with pytest.raises(DataError, match=f"--data .*: '{wrong}' is not a positive weight"):
            choose_sources([f"{tmp_path / 'b.txt'}={wrong}"], None, None)
    with pytest.raises(DataError, match=r"b\.txt: is given twice"):
        choose_sources([f"{tmp_path / 'b.txt'}=1", f"{tmp_path / 'b.txt'}=2"], None, None)


def test_a_recipe_lists_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    shown = load_recipe("hedgehog").model_dump(mode="json")
    text = json.dumps({**shown, "data": [{"source": str(tmp_path / "a.txt"), "weight": 3}]})  # JSON is YAML
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    sources, _ = choose_sources(None, None, recipe.data)
    assert [source.weight for source in sources] == [3.0]
    assert load_recipe(str(tmp_path / "r.yaml"), ["data.0.weight=2"]).data[0].weight == 2.0
    for override, message in {
        "data.0.weigth=1": r"data\.0\.weigth: unknown key; did you mean 'weight'",
        "data.0.weight=0": r"data\.0\.weight: Input should be greater than 0",
        "data=3": r"data: must be a Hub data set, or a list",
        "data=[]": r"data: must be a Hub data set, or a list",
        "drop_overlap=2": "drop_overlap: Input should be less than 1",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(tmp_path / "r.yaml"), [override])


def test_every_beginning_of_a_mixture_has_the_weights() -> None:
    sources = [
        Source(documents_of(["a" * (5 + i % 20) for i in range(900)], "a"), 0.7),
        Source(documents_of(["b" * (5 + i % 30) for i in range(900)], "b"), 0.2),
        Source(documents_of(["c" * 9] * 3, "c"), 0.1),
    ]
    corpus = build_corpus(sources, byte_tokenizer(), Budget(9_000, 300, 1))
    assert [part.tokens for part in corpus.parts] == [6_300, 1_800, 900]
    assert [part.epochs for part in corpus.parts] == [1.0, 1.0, pytest.approx(900 / 30)]
    assert corpus.epochs == pytest.approx(9_000 / (6_300 + 1_800 + 30))
    assert corpus.remarks() == ["c is used 30.0 times: it has fewer tokens than its budget."]
    owner = np.repeat(corpus.document_labels, np.diff(corpus.document_starts, append=9_000))
    for end in range(500, 9_001, 500):
        given_tokens = np.bincount(owner[:end], minlength=3)
        assert np.abs(given_tokens - end * np.array([0.7, 0.2, 0.1])).max() < 40  # a document of 36 tokens at most
    again = build_corpus(sources, byte_tokenizer(), Budget(9_000, 300, 1))
    assert np.array_equal(corpus.tokens, again.tokens)
    assert corpus.fingerprint == again.fingerprint
    heavier = [*sources[:2], Source(sources[2].documents, 0.2)]
    assert build_corpus(heavier, byte_tokenizer(), Budget(9_000, 300, 1)).fingerprint != corpus.fingerprint


def test_a_source_without_text_or_share_is_named() -> None:
    good = Source(documents_of(["text"] * 9, "good"))
    with pytest.raises(DataError, match="^bad: holds no text to train on"):
        build_corpus([good, Source(documents_of([], "bad"))], byte_tokenizer(), Budget(100, 0))
    with pytest.raises(DataError, match="^slight: its share of the tokens is none at all"):
        build_corpus([good, Source(documents_of(["x"], "slight"), 1e-9)], byte_tokenizer(), Budget(100, 0))


# --- packing: nothing lost --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=40),
    epochs=st.integers(1, 3),
    row=st.integers(2, 9),
    seed=st.integers(0, 5),
)
def test_every_token_comes_once_an_epoch(lengths: list[int], epochs: int, row: int, seed: int) -> None:
    """Rows together hold each document's tokens as often as there are epochs, and documents stay in one piece."""
    texts = [chr(97 + i % 26) * size + str(i) for i, size in enumerate(lengths)]
    once = sum(len(text) + 1 for text in texts)
    assume(once * epochs >= row)  # less than a row is refused, which other tests see
    tokenizer = byte_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        nothing_held_out(patch)
        corpus = build_corpus([Source(documents_of(texts))], tokenizer, Budget(once * epochs, 0, seed))
    for epoch in range(epochs):
        tokens = corpus.tokens[epoch * once : (epoch + 1) * once]
        starts = corpus.document_starts[(corpus.document_starts >= epoch * once)] - epoch * once
        starts = starts[starts < once]
        found = sorted(tuple(part.tolist()) for part in np.split(tokens, starts[1:]))
        assert found == sorted((*tokenizer(text)["input_ids"], 0) for text in texts)
    packed = PackedRows(corpus, length=row, rows=1, first_token=0, tokens=corpus.tokens.size, seed=seed)
    seen = np.concatenate([batch.input_ids_BT.flatten().numpy() for batch in packed])
    whole = corpus.tokens.size // row * row
    assert np.array_equal(np.bincount(seen, minlength=300), np.bincount(corpus.tokens[:whole], minlength=300))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_tokens_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chat.jsonl"
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}]})
        for i in range(50)
    ]
    path.write_text("\n".join(lines))
    tokenizer, budget, said = byte_tokenizer(PLAIN_TEMPLATE), Budget(400, 50, 0), []

    def load(budget: Budget = budget):
        said.clear()
        return load_corpus(choose_sources([str(path)], None, None)[0], tokenizer, budget, say=said.append)

    built = load()
    assert said == []
    cached = load()
    assert said[0].startswith("Tokens from the cache")
    assert isinstance(cached.tokens, np.memmap)
    for name in ("tokens", "document_starts", "targets", "document_labels"):
        assert np.array_equal(getattr(built, name), getattr(cached, name))
    assert (cached.name, cached.fingerprint, cached.epochs) == (built.name, built.fingerprint, built.epochs)
    assert (cached.labels, cached.parts) == (built.labels, built.parts)
    assert {k: v.tolist() for k, v in cached.heldout.items()} == {k: v.tolist() for k, v in built.heldout.items()}
    rows = [PackedRows(c, length=20, rows=2, first_token=0, tokens=400, seed=0)[3] for c in (built, cached)]
    assert rows[0].input_ids_BT.equal(rows[1].input_ids_BT)

    load(Budget(401, 50, 0))
    assert said == []
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("a49", "b49")]))  # same size
    load()
    assert said == []
    assert len(cache.cached_corpora()) == 3
    tokens = cache.cached_corpora()[0].folder / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    load()
    assert "cannot be used" in said[0]
    assert cache.clear_corpora() > 3 * 400 * 4
    assert cache.cached_corpora() == []
    assert cached.tokens.sum() == built.tokens.sum()  # what is mapped stays


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "corpora_folder", lambda: tmp_path / "file" / "corpora")
    said: list[str] = []
    corpus = load_corpus([Source(documents_of(["text"] * 9))], byte_tokenizer(), Budget(50, 0), say=said.append)
    assert corpus.tokens.size == 50
    assert "not kept" in said[0]


def _build_in_a_process(folder: str, results: "multiprocessing.Queue[list[int]]") -> None:
    cache.corpora_folder = lambda: Path(folder)  # type: ignore[assignment]
    corpus = load_corpus([Source(documents_of([f"text {i}" for i in range(900)]))], byte_tokenizer(), Budget(5_000, 90))
    results.put([int(corpus.tokens.sum()), len(corpus.heldout)])


def test_two_processes_build_the_same_corpus(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[list[int]] = context.Queue()
    processes = [context.Process(target=_build_in_a_process, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found_folder.name for found_folder in tmp_path.glob("[!.]*")]
    assert len(list(tmp_path.iterdir())) == 1


# --- overlap ----------------------------------------------------------------------------------------------------------


def shared_by_hand(words: list[str], others: set[tuple[str, ...]]) -> tuple[int, int]:
    runs = [tuple(words[i : i + 13]) for i in range(len(words) - 12)]
    return sum(run in others for run in runs), len(runs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), copied=st.integers(0, 60), chunk=st.sampled_from([7, 50, 1 << 20]))
def test_overlap_is_counted_as_by_hand(seed: int, copied: int, chunk: int) -> None:
    """Copies with other capitals and full stops are found; runs across two documents are none."""
    generator = np.random.default_rng(seed)
    held = [f"w{i}" for i in generator.integers(0, 200, 80)]
    clean = [[f"w{i}" for i in generator.integers(0, 200, 50)] for _ in range(3)]
    dirty = [*clean[0][:10], *held[5 : 5 + copied], *clean[1][:10]]
    texts = [dirty, clean[1], held[:12], held[12:24], clean[2]]
    tokenizer = word_tokenizer()

    def disguised(words: list[str]) -> str:
        return " ".join(word.upper() if i % 3 == 0 else word + " ." * (i % 2) for i, word in enumerate(words))

    with pytest.MonkeyPatch.context() as patch:
        nothing_held_out(patch)
        patch.setattr("linearize.data.grams._CHUNK", chunk)
        documents = documents_of([disguised(text) for text in texts])
        size = sum(len(tokenizer(disguised(text))["input_ids"]) + 1 for text in texts)
        corpus = build_corpus([Source(documents)], tokenizer, Budget(size, 0, 3))
        heldout = {"h": np.array(tokenizer(" ".join(held))["input_ids"], dtype=np.int32)}
        found = measure_overlap(corpus, heldout, tokenizer)
    trained = {run for text in texts for run in (tuple(text[i : i + 13]) for i in range(len(text) - 12))}
    assert found.heldout["h"] == shared_by_hand(held, trained)
    held_runs = {tuple(held[i : i + 13]) for i in range(len(held) - 12)}
    by_hand = [shared_by_hand(text, held_runs) for text in texts]
    assert found.training["s"] == tuple(np.sum(by_hand, axis=0))
    assert sorted(found.documents) == pytest.approx(sorted(seen / max(1, runs) for seen, runs in by_hand))


def test_documents_that_overlap_are_dropped(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in generator.integers(0, 200, 40)) for _ in range(600)]
    leaked = texts[7]
    (tmp_path / "held.txt").write_text(leaked)
    tokenizer = word_tokenizer()
    against = heldout_from(str(tmp_path / "held.txt"), None, tokenizer, 1000)
    sources = [Source(documents_of([*texts, f"{leaked} {texts[8]}"]))]

    def build(threshold: float | None):
        return build_corpus(sources, tokenizer, Budget(26_000, 0, 0, threshold), against)

    whole, half, clean = build(None), build(0.6), build(0.0)
    dropped = [corpus.parts[0].dropped for corpus in (whole, half, clean)]
    assert dropped == [0, 1, 2]
    shares = [measure_overlap(corpus, against, tokenizer).heldout["held"].share for corpus in (whole, half, clean)]
    assert shares == [1.0, 1.0, 0.0]
    assert len({corpus.fingerprint for corpus in (whole, half, clean)}) == 3
    assert clean.tokens.size == 26_000
    assert clean.remarks()[-1] == "s: 2 documents that overlap with held-out text are left out."
    with pytest.raises(DataError, match="all its 1 documents overlap with held-out text"):
        build_corpus([Source(documents_of([leaked] + [""] * 600))], tokenizer, Budget(10, 0, 0, 0.0), against)
