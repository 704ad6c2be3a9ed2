"""How many tokens a model can read: without end, but where positions are a table that was learned."""

from __future__ import annotations

from transformers import PreTrainedConfig

from linearize.errors import RunError
from linearize.families import FAMILIES
from linearize.surgery import STUDENT_PREFIX


def last_position(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a teacher or a student can read; None where positions are computed, or unknown."""
    family = FAMILIES.get(config.model_type.removeprefix(STUDENT_PREFIX))
    if family is None or family.positions != "learned":
        return None
    last: int = config.max_position_embeddings
    return last


def check_reach(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Refuse to generate beyond a table of positions: it would end in an IndexError, on a GPU in a failed assertion.

    Raises:
        RunError: a prompt of so many tokens and so many new ones do not fit.
    """
    last = last_position(config)
    if last is not None and prompt + new - 1 > last:  # the last token is not read
        raise RunError(
            f"a prompt of {prompt:,} tokens and {new:,} new ones are too many for {last:,} learned positions.",
            place=config.model_type,
            remedy="Ask for fewer new tokens, or shorten the prompt.",
        )
