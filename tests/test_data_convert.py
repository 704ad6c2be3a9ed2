"""A conversion with texts and conversations mixed by weight, from the command line's words to the metrics."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linearize.data import PackedRows
from linearize.errors import RunInterrupted
from linearize.job import Conversion
from linearize.pipeline import convert

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = (
    *(f"stages.{stage}.{setting}" for stage in (0, 1) for setting in ("length=32", "batch=2", "micro_batch=1")),
    "stages.0.tokens=256",
    "stages.1.tokens=640",
    "heldout_tokens=128",
    "precision=fp32",
    "drop_overlap=0.2",
)


@pytest.fixture
def job(make_teacher, tmp_path: Path) -> Conversion:
    folder = tmp_path / "teacher"
    vocabulary = {"<end>": 0} | {char: i + 1 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    make_teacher(vocab_size=257, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    draw = random.Random(0)
    text = "\n".join(json.dumps({"text": "".join(draw.choices("abcdefgh ", k=80))}) for _ in range(30))
    (tmp_path / "text.jsonl").write_text(text)
    talks = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "".join(draw.choices("xyz", k=30))}]
        for i in range(30)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    data = (f"{tmp_path / 'text.jsonl'}=3", f"{tmp_path / 'chat.jsonl'}=1")
    return Conversion(str(folder), out=tmp_path / "student", data=data, overrides=SHORT, device="cpu")


def test_a_mixture_is_converted_and_resumed(job: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(record=True, width=10_000, file=open(os.devnull, "w"))  # noqa: SIM115  lives as long as the test
    whole = convert(job, shown)
    said = " ".join(shown.export_text().split())
    assert "text.jsonl (0.75 of the tokens)" in said
    assert "in runs of 13 tokens: held-out 0.00%" in said
    metrics = json.loads((whole.folder / "metrics.json").read_text())
    assert metrics["overlap"] == {"held-out": 0.0}
    assert metrics["command"].count("--data ") == 2

    read = PackedRows.__getitem__

    def interrupted(self: PackedRows, index: int):
        if index == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, index)

    again = Conversion(**{**vars(job), "out": Path(job.out).with_name("again")})
    with monkeypatch.context() as patch:
        patch.setattr(PackedRows, "__getitem__", interrupted)
        with pytest.raises(RunInterrupted):
            convert(again, Console(quiet=True))
    resumed = convert(Conversion(**{**vars(again), "resume": True}), Console(quiet=True))
    assert resumed.student == whole.student
    assert resumed.untrained == whole.untrained
