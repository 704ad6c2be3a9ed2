"""A teacher that writes documents: from one token, from prompts, or as conversations with itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from transformers import GenerationConfig, LogitsProcessorList

from linearize.config import Config, Number
from linearize.data.chat import Conversation, Message, render
from linearize.data.draws import Draws, uniforms
from linearize.endings import ends_of, until_end
from linearize.errors import DataError
from linearize.reach import check_reach
from linearize.teacher import Teacher

_ASKED_TOKENS = 256  # at most, of a question that the teacher asks itself
_ROUND = 16  # prompts are padded to a multiple of this many tokens, so that few shapes occur
_MARK = "\x1aquestion\x1a"  # stands where a template puts the user's words


class Sampling(Config):
    """How documents are drawn."""

    temperature: Number = Field(1.0, gt=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)
    length: int = Field(1024, ge=1, description="new tokens of a document, or of a reply, at most")


class Written(NamedTuple):
    """One document.

    Attributes:
        number: which one; with the seed it gives the random numbers.
        content: text or a conversation.
        tokens: that the teacher wrote.
        finished: whether the teacher ended it, rather than `Sampling.length`.
    """

    number: int
    content: str | Conversation
    tokens: int
    finished: bool


class _Continuation(NamedTuple):
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Writer:
    """Writes documents by number.

    Attributes:
        teacher: who writes.
        sampling: how tokens are drawn.
        prompts: what documents begin with, in turn; empty = `start`, or the teacher's own questions.
        chat: write conversations: prompts are the user's words. Without prompts the teacher is given its template up
            to where the user's words would stand, writes those too, and then replies (arXiv 2406.08464; its abstract
            and project page were read, its code was not, and nothing is filtered here).
        start: what a document without a prompt begins with, usually a special token; it is not part of the document.
        on_step: called with the number of each step of a batch.
    """

    teacher: Teacher
    sampling: Sampling
    prompts: tuple[str, ...]
    chat: bool
    start: str
    on_step: Callable[[int], None] = lambda _: None

    def write(self, numbers: Sequence[int]) -> list[Written]:
        """The documents of these numbers, in order; blank ones, and questions without an end, are left out.

        Raises:
            DataError: there is no chat template for conversations.
            RunError: the teacher has a table of positions, which ends before its documents would.
        """
        if self.chat:
            return self._conversations(numbers)
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers] if self.prompts else []
        starts = [self._tokens(prompt, True) for prompt in prompts] or [self._tokens(self.start, False)] * len(numbers)
        continuations = self._continue(starts, numbers, 0, self.sampling.length)
        texts = [a + b.text for a, b in zip(prompts or [""] * len(numbers), continuations, strict=True)]
        return [
            Written(number, text, found.tokens, found.finished)
            for number, text, found in zip(numbers, texts, continuations, strict=True)
            if found.text.strip()
        ]

    def _conversations(self, numbers: Sequence[int]) -> list[Written]:
        asked = self._questions(numbers)
        kept = [number for number in numbers if number in asked]
        talks = [(Message("user", asked[number].text),) for number in kept]
        starts = [self._tokens(render(self.teacher.tokenizer, talk, prompt=True), False) for talk in talks]
        replies = self._continue(starts, kept, 1, self.sampling.length) if kept else []
        return [
            Written(
                number, (*talk, Message("assistant", reply.text)), asked[number].tokens + reply.tokens, reply.finished
            )
            for number, talk, reply in zip(kept, talks, replies, strict=True)
            if reply.text.strip()
        ]

    def _questions(self, numbers: Sequence[int]) -> dict[int, _Continuation]:
        if self.prompts:
            return {number: _Continuation(self.prompts[number % len(self.prompts)], 0, True) for number in numbers}
        template = render(self.teacher.tokenizer, (Message("user", _MARK),), prompt=False)
        before, found, _ = template.partition(_MARK)
        if not found:
            raise DataError(
                "its chat template does not spell the user's words as they are.",
                place=str(self.teacher.model.config.name_or_path),
                remedy="Give --prompts, or leave out --chat.",
            )
        start = self._tokens(before, False)
        questions = self._continue([start] * len(numbers), numbers, 0, _ASKED_TOKENS)
        pairs = zip(numbers, questions, strict=True)
        return {number: found for number, found in pairs if found.finished and found.text.strip()}

    def _tokens(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.teacher.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    @torch.inference_mode()
    def _continue(self, starts: list[list[int]], numbers: Sequence[int], turn: int, steps: int) -> list[_Continuation]:
        """What the teacher writes after each start, in one batch padded on the left."""
        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        longest = max(map(len, starts))
        width = longest if all(len(start) == longest for start in starts) else -(-longest // _ROUND) * _ROUND
        check_reach(model.config, longest, steps)  # padding takes no positions
        pad = tokenizer.pad_token_id
        assert isinstance(pad, int), "load_teacher sees to it"
        ids_BT = torch.tensor([[pad] * (width - len(start)) + start for start in starts])
        mask_BT = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
        uniforms_BS = uniforms(self.sampling.seed, numbers, turn, steps).to(model.device)
        draws = Draws(uniforms_BS, width, self.sampling.temperature, self.sampling.top_p, self.on_step)
        ends = ends_of(model, tokenizer)
        out_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            logits_processor=LogitsProcessorList([draws]),
            generation_config=self._settings(steps, ends),
        )
        rows = [until_end(row, ends) for row in out_BT[:, width:].tolist()]
        texts = tokenizer.batch_decode([row for row, _ in rows], skip_special_tokens=True)
        return [
            _Continuation(text, len(row) + finished, finished)
            for text, (row, finished) in zip(texts, rows, strict=True)
        ]

    def _settings(self, steps: int, ends: list[int]) -> GenerationConfig:
        """Greedy, as `Draws` leaves one token to choose; what the teacher's own settings would change is undone."""
        return GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=ends,
            pad_token_id=self.teacher.tokenizer.pad_token_id,
        )
