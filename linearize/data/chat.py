"""Conversations: checked, spelt with the tokenizer's chat template, with the replies marked, which alone are learnt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from linearize.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",  # ShareGPT's names
    "gpt": "assistant",
}
"""What data sets call the speakers -> what chat templates call them."""

_KEYS = (("role", "content"), ("from", "value"))
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Message(NamedTuple):
    role: str
    content: str


Conversation = tuple[Message, ...]


class Spelt(NamedTuple):
    """A conversation in tokens.

    Attributes:
        tokens: int32 [N], as the template spells it.
        replies: bool [N]; True for the tokens of the assistant's replies, with the token that ends each.
    """

    tokens: npt.NDArray[np.int32]
    replies: npt.NDArray[np.bool_]


def parse_conversation(value: object, place: str) -> Conversation | None:
    """A list of `{role, content}` (or `{from, value}`) as messages; None where there is no reply to learn.

    Raises:
        DataError: it is no such list, a role is unknown, or the assistant speaks first.
    """
    if value is None:
        return None
    remedy = "A conversation is a list of {role, content}, such as [{role: user, …}, {role: assistant, …}]."
    if not isinstance(value, (list, tuple)):
        raise DataError(f"holds a {type(value).__name__}, not a conversation.", place=place, remedy=remedy)
    messages = tuple(_parse_message(item, f"{place}, message {number}") for number, item in enumerate(value))
    replies = [message for message in messages if message.role == "assistant" and message.content.strip()]
    if not replies:
        return None
    if messages[0].role == "assistant":
        raise DataError(
            "the assistant speaks first, so there is nothing it replies to.",
            place=place,
            remedy="Begin with a system or user message, or drop the row.",
        )
    return messages


def _parse_message(item: object, place: str) -> Message:
    found = f"keys: {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"got a {type(item).__name__}"
    if isinstance(item, Mapping):
        for role_key, content_key in _KEYS:
            role, content = item.get(role_key), item.get(content_key)
            if not isinstance(role, str) or not isinstance(content, str):
                continue
            if role not in ROLES:
                raise DataError(f"unknown role '{role}'.", place=place, remedy=f"Known: {', '.join(ROLES)}.")
            return Message(ROLES[role], content)
    raise DataError(
        f"no text under role and content ({found}).", place=place, remedy="Each message needs a role and a content."
    )


def spell_conversations(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Spelt]:
    """Spell conversations with the tokenizer's chat template.

    A template with `{% generation %}` marks says itself what the assistant writes. Of any other, each reply is found
    by what the template adds for it: the conversation up to the reply is spelt with the prompt for it, then with it.
    White space after a reply belongs to the template.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses a conversation, or it spells a
            conversation's beginning differently once more follows, so that replies cannot be found.
    """
    template = _template(tokenizer)
    if _MARKERS.search(template):
        return [_spell_marked(tokenizer, conversation) for conversation in conversations]
    if not tokenizer.is_fast:
        raise DataError(
            "cannot tell which characters a token spells, and its chat template does not mark replies.",
            place="tokenizer",
            remedy="Use the tokenizer's fast version, or a chat template with {% generation %} marks.",
        )
    texts = [render(tokenizer, conversation, prompt=False) for conversation in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        _mark(tokens, offsets, _reply_spans(tokenizer, conversation, text))
        for conversation, text, tokens, offsets in zip(
            conversations, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, prompt: bool) -> str:
    """The conversation as the template spells it; with `prompt`, up to where the assistant begins its reply.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    _template(tokenizer)
    with _refusals(conversation):
        return str(tokenizer.apply_chat_template(_plain(conversation), tokenize=False, add_generation_prompt=prompt))


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation]


@contextmanager
def _refusals(conversation: Conversation) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the template, a program of its own, raises
        roles = ", ".join(message.role for message in conversation)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the chat template refuses a conversation of {roles} ({reason}).",
            place="tokenizer",
            remedy="Bring the conversations into the order that the template expects.",
        ) from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "has no chat template, which conversations are spelt with.",
            place="tokenizer",
            remedy="Set tokenizer.chat_template and save it, or name a column of plain text with --text-field.",
        )
    return str(tokenizer.get_chat_template())


def _spell_marked(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Spelt:
    with _refusals(conversation):
        spelt: Any = tokenizer.apply_chat_template(
            _plain(conversation), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    return Spelt(np.array(spelt["input_ids"], dtype=np.int32), np.array(spelt["assistant_masks"], dtype=bool))


def _reply_spans(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Where in `text` the replies lie, as character ranges."""
    spans = []
    for index, message in enumerate(conversation):
        if message.role != "assistant":
            continue
        before = render(tokenizer, conversation[:index], prompt=True)
        after = render(tokenizer, conversation[: index + 1], prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                f"the chat template spells message {index} and what precedes it differently once more follows, so the "
                "replies cannot be found.",
                place="tokenizer",
                remedy="Use a chat template with {% generation %} marks, or keep one reply a conversation.",
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def _mark(tokens: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Spelt:
    """True for each token that spells a character of a span, even where it spells one before it too."""
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    replies = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        replies |= (bounds[:, 0] < end) & (bounds[:, 1] > start)
    return Spelt(np.array(tokens, dtype=np.int32), replies)
