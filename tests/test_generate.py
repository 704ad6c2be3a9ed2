"""Text that a teacher writes: draws, documents, resuming. Tiny random teachers, no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from linearize.cli import app
from linearize.data import choose_sources
from linearize.data.chat import Message
from linearize.data.draws import draw, uniforms
from linearize.data.generate import Generation, generate
from linearize.data.writer import Sampling, Writer
from linearize.errors import DataError, RunError, RunInterrupted
from linearize.teacher import load_teacher

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(make_teacher: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random teacher of bytes, on disk; about one token in twenty ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<eos>", "<bos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>", chat_template=TEMPLATE
    )
    model = make_teacher(vocab_size=258, eos_token_id=0, num_hidden_layers=2, initializer_range=0.05)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] *= 4  # likelier than other tokens, now and then
    path = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def silent(_: str) -> None:
    pass


def job(folder: str, out: Path, **options: object) -> Generation:
    sampling = Sampling(length=24, seed=3, temperature=0.9, top_p=0.95)
    return Generation(**{"model": folder, "out": out, "tokens": 200, "sampling": sampling, "batch": 4, **options})


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_teachers_distribution(temperature: float) -> None:
    scores_V = torch.randn(9, generator=torch.Generator().manual_seed(0)) * 2
    points = 4000
    grid = (torch.arange(points) + 0.5) / points  # evenly over [0, 1): frequencies are probabilities, but for rounding
    drawn = draw(scores_V.expand(points, -1), grid, temperature, 1.0)
    expected = torch.softmax(scores_V / temperature, -1)
    assert torch.bincount(drawn, minlength=9) / points == pytest.approx(expected.numpy(), abs=1.5 / points)


def test_top_p_keeps_the_likeliest_tokens_alone() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    grid = (torch.arange(900) + 0.5) / 900
    for top_p, kept in {0.3: [1], 0.41: [1, 3], 0.69: [1, 3], 0.71: [1, 2, 3], 0.999: [0, 1, 2, 3]}.items():
        drawn = draw(probabilities.log().expand(900, -1), grid, 1.0, top_p)
        expected = torch.zeros(4)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert torch.bincount(drawn, minlength=4) / 900 == pytest.approx(expected.numpy(), abs=2 / 900), top_p


def test_extreme_random_numbers_never_draw_what_cannot_be() -> None:
    scores_BV = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    edges = torch.tensor([0.0, np.nextafter(np.float32(1), np.float32(0))])
    for top_p in (1.0, 0.9):
        assert set(draw(scores_BV, edges, 1.0, top_p).tolist()) == {1, 2}


def test_random_numbers_belong_to_documents() -> None:
    many = uniforms(5, [0, 7, 9], 0, 10)
    assert torch.equal(many[1], uniforms(5, [7], 0, 10)[0])
    assert torch.equal(many[:, :4], uniforms(5, [0, 7, 9], 0, 4))
    others = [uniforms(6, [7], 0, 10), uniforms(5, [8], 0, 10), uniforms(5, [7], 1, 10)]
    assert not any(torch.equal(many[1], other[0]) for other in others)
    assert 0 <= float(many.min()) <= float(many.max()) < 1


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"prompts": ("a", "a longer one", "b")}, {"chat": True}])
def test_a_document_does_not_depend_on_its_batch(folder: str, mode: dict) -> None:
    teacher = load_teacher(folder)
    options = {"prompts": (), "chat": False, "start": "<bos>", **mode}
    writer = Writer(teacher, Sampling(length=20, seed=1), **options)
    together = {document.number: document for document in writer.write(range(12))}
    alone = {number: written[0] for number in range(12) if (written := writer.write([number]))}
    assert together == alone
    assert len({document.content for document in together.values()}) > 3
    for document in together.values():
        assert document.finished or document.tokens >= 20
        if isinstance(document.content, str):
            assert "<eos>" not in document.content
            assert document.content.startswith(options["prompts"][document.number % 3] if options["prompts"] else "")
        else:
            assert [message.role for message in document.content] == ["user", "assistant"]


def test_sampling_is_that_of_transformers(folder: str) -> None:
    """Each token is the one that `draw` takes from the teacher's own logits of what precedes it."""
    teacher = load_teacher(folder)
    sampling = Sampling(length=15, seed=2, temperature=0.8, top_p=0.9)
    (document,) = Writer(teacher, sampling, ("once upon",), False, "<bos>").write([4])
    ids = teacher.tokenizer("once upon")["input_ids"]
    for uniform in uniforms(2, [4], 0, 15)[0]:
        scores = teacher.model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(draw(scores, uniform[None], 0.8, 0.9)))
        if ids[-1] == 0:
            break
    assert document.content == teacher.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_template_that_changes_the_words_is_refused(folder: str) -> None:
    teacher = load_teacher(folder)
    teacher.tokenizer.chat_template = "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(DataError, match="does not spell the user's words as they are.*--prompts"):
        Writer(teacher, Sampling(), (), True, "<bos>").write([0])
    teacher.tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        Writer(teacher, Sampling(), (), True, "<bos>").write([0])


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_stopped_and_repeated_a_job_gives_the_same_file(folder: str, tmp_path: Path, chat: bool) -> None:
    whole = generate(job(folder, tmp_path / "whole.parquet", chat=chat), silent, silent)
    assert whole.tokens >= 200
    steps = 0

    def stop(_: str) -> None:
        nonlocal steps
        steps += 1
        if steps in (30, 70, 71, 150):
            raise KeyboardInterrupt

    out = tmp_path / "stopped.parquet"
    stops = 0
    while True:
        try:
            found = generate(job(folder, out, chat=chat), silent, stop)
            break
        except RunInterrupted as stopped:
            stops += 1
            assert "the same command goes on" in str(stopped)
            (tmp_path / "stopped.parquet.parts" / ".batch_000009.parquet.tmp").write_bytes(b"half")
    assert stops >= 2
    assert found.new_tokens < found.tokens
    left, right = pq.read_table(tmp_path / "whole.parquet"), pq.read_table(out)
    assert left.equals(right, check_metadata=True)
    assert sum(left["tokens"].to_pylist()[:-1]) < 200 <= whole.tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.parquet", "whole.parquet"]
    row = left.to_pylist()[0]
    assert (row["seed"], row["temperature"], row["top_p"], row["document"]) == (3, 0.9, 0.95, 0)
    assert row["teacher"] == Path(folder).name

    said: list[str] = []
    assert generate(job(folder, out, chat=chat), said.append, silent).tokens == whole.tokens
    assert said == [f"{out} is complete already."]
    sources, _ = choose_sources([str(out)], None, None)
    source, content = next(iter(sources[0].documents))
    assert source == f"written by {Path(folder).name}"
    assert content == (row["text"] if not chat else tuple(Message(**message) for message in row["messages"]))


@pytest.mark.parametrize(("tokens", "length"), [(30, 1024), (30, 8)])
def test_no_more_is_written_than_was_asked_for(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, length: int
) -> None:
    """A batch of the default size would have 16 documents of the full length."""
    plain, written = Writer._continue, []

    def count(self: Writer, starts: list[list[int]], numbers: Sequence[int], turn: int, steps: int) -> list:
        written.append(len(starts) * steps)
        return plain(self, starts, numbers, turn, steps)

    monkeypatch.setattr(Writer, "_continue", count)
    sampling = Sampling(length=length, seed=3)
    found = generate(job(folder, tmp_path / "a.parquet", tokens=tokens, sampling=sampling, batch=None), silent, silent)
    assert tokens <= found.tokens < tokens + min(length, tokens)
    assert written[0] < tokens + length
    assert max(written) < 2 * tokens
    assert generate(job(folder, tmp_path / "b.parquet", tokens=1, batch=3), silent, silent).tokens == 1


def test_another_job_does_not_go_on(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.parquet"

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        generate(job(folder, out), silent, stop)
    other = Sampling(length=24, seed=4, temperature=0.9, top_p=0.95)
    with pytest.raises(RunError, match=r"begun with another seed \(was 3, is 4\), another batch \(was 4, is 8\)"):
        generate(job(folder, out, sampling=other, batch=8), silent, silent)
    generate(job(folder, out), silent, silent)
    with pytest.raises(RunError, match=r"a\.parquet: exists already, and is not what this command writes"):
        generate(job(folder, out, sampling=other), silent, silent)
    with pytest.raises(DataError, match="--start: is for texts without a prompt"):
        generate(job(folder, out, start="a", chat=True), silent, silent)
    (tmp_path / "b.parquet").write_text("mine")
    with pytest.raises(RunError, match=r"b\.parquet: exists already"):
        generate(job(folder, tmp_path / "b.parquet"), silent, silent)
    monkeypatch.setattr(Writer, "write", lambda self, numbers: [])
    with pytest.raises(DataError, match="wrote nothing in 12 documents"):
        generate(job(folder, tmp_path / "c.parquet"), silent, silent)


def test_another_teacher_of_the_same_name_does_not_go_on(folder: str, tmp_path: Path) -> None:
    """A folder has no revision: its weights say whether what is there is its own."""
    mine = tmp_path / "teacher"
    shutil.copytree(folder, mine)
    generate(job(str(mine), tmp_path / "a.parquet"), silent, silent)
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"a\.parquet: exists already"):
        generate(job(str(mine), tmp_path / "a.parquet"), silent, silent)
    with pytest.raises(DataError, match=r"a\.txt: is a parquet file"):
        generate(job(str(mine), tmp_path / "a.txt"), silent, silent)


def test_commands(folder: str, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    out = tmp_path / "g.parquet"
    run("data", "generate", "-m", folder, "--tokens", "60", "-o", out, "--prompts", tmp_path / "p.txt", "--length", 9)
    texts = [row["text"] for row in pq.read_table(out).to_pylist()]
    assert {text[:3] for text in texts} == {"one", "two"}
    said = run("data", "overlap", "-m", folder, "--data", out, "--heldout", tmp_path / "p.txt", "--tokens", 50)
    assert "would drop of" in said
    assert "50" in run("data", "cache")
    assert "MB freed" in run("data", "cache", "--clear")
    assert "No tokens are cached" in run("data", "cache", "--show")
    assert json.loads(pq.read_schema(out).metadata[b"linearize"])["length"] == 9
