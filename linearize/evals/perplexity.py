"""Perplexity on held-out text, by window length.

Shape legend: B windows, T tokens a window, C tokens a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.errors import DataError, TeacherError
from linearize.logits import Head, head_of

Autocast = Callable[[], AbstractContextManager[object]]
OpenModel = Callable[[], AbstractContextManager[PreTrainedModel]]

_CHUNK_ELEMENTS = 2**24  # logits held in fp32 at once: 64 MiB
_CHECK_TOKENS = 8


@dataclass(frozen=True)
class Perplexity:
    """What one model made of one text.

    Attributes:
        nll: mean negative log-likelihood in nats per predicted token.
        perplexity: exp(nll).
        tokens: predicted tokens: windows * (length - 1).
        length: tokens per window.
        standard_error: of nll, over windows; None with a single window.
    """

    nll: float
    perplexity: float
    tokens: int
    length: int
    standard_error: float | None


# Seven arguments: the measured (two), the windows (two), how to compute (three, optional).
def perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    length: int,
    max_tokens: int,
    batch_rows: int = 1,
    autocast: Autocast | None = None,
    head: Head | None = None,
) -> Perplexity:
    """Perplexity over windows that do not overlap; each window starts without context and predicts its T-1 next tokens.

    The trunk (`model.base_model`) runs once a batch; the head and an fp32 log-softmax run on chunks of tokens, so that
    [T, V] logits are never whole in memory. The model is put in eval mode and back.

    Args:
        model: a Hugging Face causal language model.
        tokens: 1-D token ids; the first `max_tokens` are used, cut to whole windows.
        length: T >= 2.
        max_tokens: limit on the tokens read.
        batch_rows: B, windows per forward.
        autocast: makes a context around each forward, such as `lambda: torch.autocast("cuda", torch.bfloat16)`.
        head: [.., D] hidden states -> [.., V] logits; default `head_of(model)`.

    Raises:
        DataError: less text than one window.
        TeacherError: the default head does not give the model's own logits.
    """
    assert length >= 2
    assert batch_rows >= 1
    available = min(tokens.size, max_tokens)
    count = available // length
    if not count:
        raise DataError(
            f"{available:,} tokens of held-out text, less than one window of {length:,}.",
            place="perplexity",
            remedy="Give more held-out text, allow more tokens or choose a shorter window.",
        )
    windows = torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)
    context = autocast or nullcontext
    means: list[Tensor] = []
    with torch.no_grad(), _eval_mode(model):
        if head is None:
            head = head_of(model)
            with context():
                _check_head(model, head, windows[:1, :_CHECK_TOKENS].to(model.device))
        for input_ids_BT in windows.split(batch_rows):
            with context():
                means.append(_window_nll(model, head, input_ids_BT.to(model.device)))
    return _summary(torch.cat(means).double().cpu(), length)


def _check_head(model: PreTrainedModel, head: Head, input_ids_BT: Tensor) -> None:
    """A family may do to its logits what LOGIT_RULES does not know: compare with its own logits on a few tokens."""
    own = model(input_ids_BT, use_cache=False).logits.float()
    ours = head(model.base_model(input_ids_BT, use_cache=False).last_hidden_state).float()
    error = (own - ours).abs().max().item()
    if error > 1e-2 * (1 + own.abs().max().item()):
        raise TeacherError(
            f"the output embedding of {type(model).__name__} does not give its logits (they differ by {error:.3g}).",
            place="perplexity",
            remedy="Pass `head`, which maps the trunk's hidden states to logits.",
        )


def _window_nll(model: PreTrainedModel, head: Head, input_ids_BT: Tensor) -> Tensor:
    """Mean NLL of each window, fp32 [B]."""
    hidden_BTD = model.base_model(input_ids_BT, use_cache=False).last_hidden_state[:, :-1]
    targets_BT = input_ids_BT[:, 1:]
    rows, columns = targets_BT.shape
    chunk = max(1, _CHUNK_ELEMENTS // (rows * model.get_output_embeddings().weight.shape[0]))
    total_B = torch.zeros(rows, device=input_ids_BT.device)
    for start in range(0, columns, chunk):
        logits_BCV = head(hidden_BTD[:, start : start + chunk]).float()
        losses = F.cross_entropy(
            logits_BCV.flatten(0, 1), targets_BT[:, start : start + chunk].flatten(), reduction="none"
        )
        total_B += losses.view(rows, -1).sum(dim=1)
    return total_B / columns


def _summary(nll_N: Tensor, length: int) -> Perplexity:
    mean = nll_N.mean().item()
    count = nll_N.numel()
    error = nll_N.std().item() / math.sqrt(count) if count > 1 else None
    return Perplexity(mean, torch.tensor(mean).double().exp().item(), count * (length - 1), length, error)


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and each module's own mode back: a frozen trunk may be in eval mode inside a model that trains."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def perplexity_table(
    models: Mapping[str, OpenModel],
    heldout: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    *,
    max_tokens: int,
    autocast: Autocast | None = None,
) -> list[dict[str, str | int | float | None]]:
    """Perplexity of several models on the same windows of each source, at each length.

    Args:
        models: name -> a callable that opens a context and yields the model. A plain model is
            `lambda: nullcontext(model)`; one copy of weights that is teacher and student opens the part it plays.
        heldout: source -> 1-D token ids.
        lengths: window lengths.
        max_tokens: limit per source and length.
        autocast: as in `perplexity`.

    Returns:
        One row per source and length: `source`, `length`, `tokens` (predicted), for each model NAME its perplexity
        `NAME`, its `NAME_nll` and `NAME_standard_error`; and `ratio`, student / teacher, when `models` has both.
        A source shorter than a window keeps its row, with `tokens` 0 and None for every number.

    Raises:
        DataError: no source fills one window of any length.
    """
    measured: dict[tuple[str, int, str], Perplexity] = {}
    for name, open_model in models.items():
        with open_model() as model:
            for source, tokens in heldout.items():
                for length in lengths:
                    if min(tokens.size, max_tokens) >= length:
                        measured[source, length, name] = perplexity(
                            model, tokens, length=length, max_tokens=max_tokens, autocast=autocast
                        )
    if not measured:
        longest = max((min(tokens.size, max_tokens) for tokens in heldout.values()), default=0)
        raise DataError(
            f"no source has one window of {min(lengths):,} tokens; the longest has {longest:,}.",
            place="perplexity",
            remedy="Give more held-out text, allow more tokens or choose shorter windows.",
        )
    return [_row(source, length, list(models), measured) for source in heldout for length in lengths]


def _row(
    source: str, length: int, names: list[str], measured: Mapping[tuple[str, int, str], Perplexity]
) -> dict[str, str | int | float | None]:
    row: dict[str, str | int | float | None] = {"source": source, "length": length, "tokens": 0}
    found = {name: measured[source, length, name] for name in names if (source, length, name) in measured}
    for name in names:
        result = found.get(name)
        row[name] = result.perplexity if result else None
        row[f"{name}_nll"] = result.nll if result else None
        row[f"{name}_standard_error"] = result.standard_error if result else None
        row["tokens"] = result.tokens if result else 0
    if "student" in names and "teacher" in names:
        both = "student" in found and "teacher" in found
        row["ratio"] = math.exp(found["student"].nll - found["teacher"].nll) if both else None
    return row
