"""Perplexity on held-out text, by window length.

Shape legend: B windows, T tokens a window, C tokens a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
    losses_NT = token_losses(
        model, tokens, length=length, max_tokens=max_tokens, batch_rows=batch_rows, autocast=autocast, head=head
    )
    return summary(losses_NT.double().mean(dim=1), length)


# Seven arguments, as above.
def token_losses(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    length: int,
    max_tokens: int,
    batch_rows: int = 1,
    autocast: Autocast | None = None,
    head: Head | None = None,
) -> Tensor:
    """Negative log-likelihood in nats of every predicted token, [windows, length - 1] in fp32 on the CPU.

    Arguments and errors are those of `perplexity`; column t is the token at position t + 1 of its window.
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
    losses: list[Tensor] = []
    with torch.no_grad(), eval_mode(model):
        if head is None:
            head = head_of(model)
            with context():
                _check_head(model, head, windows[:1, :_CHECK_TOKENS].to(model.device))
        for input_ids_BT in windows.split(batch_rows):
            with context():
                losses.append(_window_losses(model, head, input_ids_BT.to(model.device)).cpu())
    return torch.cat(losses)


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


def _window_losses(model: PreTrainedModel, head: Head, input_ids_BT: Tensor) -> Tensor:
    """NLL of each predicted token, fp32 [B, T - 1]."""
    hidden_BTD = model.base_model(input_ids_BT, use_cache=False).last_hidden_state[:, :-1]
    targets_BT = input_ids_BT[:, 1:]
    rows, columns = targets_BT.shape
    chunk = max(1, _CHUNK_ELEMENTS // (rows * model.get_output_embeddings().weight.shape[0]))
    found: list[Tensor] = []
    for start in range(0, columns, chunk):
        logits_BCV = head(hidden_BTD[:, start : start + chunk]).float()
        losses = F.cross_entropy(
            logits_BCV.flatten(0, 1), targets_BT[:, start : start + chunk].flatten(), reduction="none"
        )
        found.append(losses.view(rows, -1))
    return torch.cat(found, dim=1)


def summary(nll_N: Tensor, length: int) -> Perplexity:
    """Of the mean NLL of each window [N]."""
    mean = nll_N.mean().item()
    count = nll_N.numel()
    error = nll_N.std().item() / math.sqrt(count) if count > 1 else None
    return Perplexity(mean, torch.tensor(mean).double().exp().item(), count * (length - 1), length, error)


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and each module's own mode back: a frozen trunk may be in eval mode inside a model that trains."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
