"""Perplexity against a direct computation from the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from linearize import logits
from linearize.errors import DataError, TeacherError
from linearize.evals import perplexity as module
from linearize.evals.perplexity import perplexity

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Random models give flat logits; make them matter."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return sharpen(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, 200).astype(np.int32)


def window_nlls(model: PreTrainedModel, tokens: np.ndarray, length: int) -> Tensor:
    """fp64 mean NLL of each window, one model call each."""
    model.eval()
    count = tokens.size // length
    found = []
    with torch.no_grad():
        for window in torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, 1, length):
            logits = model(window, use_cache=False).logits[0, :-1].double()
            found.append(F.cross_entropy(logits, window[0, 1:]))
    return torch.stack(found)


@pytest.mark.parametrize("length", [2, 33, 64, 200])
@pytest.mark.parametrize("batch_rows", [1, 3])
def test_equals_the_model_s_own_logits(
    model: PreTrainedModel, tokens: np.ndarray, length: int, batch_rows: int
) -> None:
    result = perplexity(model, tokens, length=length, max_tokens=10**6, batch_rows=batch_rows)
    nlls = window_nlls(model, tokens, length)
    assert result.nll == pytest.approx(nlls.mean().item(), abs=1e-5)
    assert result.perplexity == pytest.approx(nlls.mean().exp().item(), rel=1e-5)
    assert result.tokens == (200 // length) * (length - 1)
    assert result.length == length
    if length == 200:
        assert result.standard_error is None
    else:
        assert result.standard_error == pytest.approx(nlls.std().item() / len(nlls) ** 0.5, abs=1e-5)


def test_chunks_change_nothing(model: PreTrainedModel, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(model, tokens, length=50, max_tokens=200)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", VOCABULARY * 7)
    assert perplexity(model, tokens, length=50, max_tokens=200).nll == pytest.approx(whole.nll, abs=1e-6)


FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_rescale_their_logits(family: str, tokens: np.ndarray) -> None:
    torch.manual_seed(0)
    scaled = sharpen(FAMILIES[family]())
    result = perplexity(scaled, tokens, length=50, max_tokens=200)
    assert result.nll == pytest.approx(window_nlls(scaled, tokens, 50).mean().item(), abs=1e-5)


def test_unknown_rescaling_is_refused_unless_a_head_is_given(
    tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    granite = sharpen(FAMILIES["granite"]())
    monkeypatch.setattr(logits, "LOGIT_RULES", {})
    with pytest.raises(TeacherError, match="GraniteForCausalLM does not give its logits"):
        perplexity(granite, tokens, length=50, max_tokens=200)
    embedding = granite.get_output_embeddings()
    result = perplexity(granite, tokens, length=50, max_tokens=200, head=lambda hidden: embedding(hidden) / 3)
    assert result.nll == pytest.approx(window_nlls(granite, tokens, 50).mean().item(), abs=1e-5)


def test_autocast_and_bf16(model: PreTrainedModel, tokens: np.ndarray) -> None:
    exact = perplexity(model, tokens, length=50, max_tokens=200)
    rounded = perplexity(
        model, tokens, length=50, max_tokens=200, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert rounded.nll != exact.nll
    assert rounded.nll == pytest.approx(exact.nll, abs=0.05)


def test_modes_come_back(tokens: np.ndarray) -> None:
    dropout = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5))
    dropout.train()
    dropout.model.layers[0].eval()
    first = perplexity(dropout, tokens, length=50, max_tokens=200)
    assert first == perplexity(dropout, tokens, length=50, max_tokens=200)
    assert dropout.training
    assert not dropout.model.layers[0].training
    assert dropout.model.layers[1].self_attn.training
    assert all(isinstance(parameter, nn.Parameter) and parameter.grad is None for parameter in dropout.parameters())


def test_too_little_text(model: PreTrainedModel, tokens: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"200 tokens of held-out text, less than one window of 201"):
        perplexity(model, tokens, length=201, max_tokens=10**6)
    with pytest.raises(DataError, match=r"60 tokens of held-out text, less than one window of 64"):
        perplexity(model, tokens, length=64, max_tokens=60)
