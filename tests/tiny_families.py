"""A tiny random teacher of every family, and softmax attention written anew as a mixer.

For the contract test and for scripts/families_table.py. Sizes and switches are chosen so that everything a family is
special for changes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.families import FAMILIES
from linearize.mixers import HeadInputs, HeadShapes, MixerConfig, MixerState, StudentMixer

VOCABULARY = 97
LAYERS = 3

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, **ALTERNATING},
    "qwen3": {"head_dim": 24, "use_sliding_window": True, **ALTERNATING},
    "qwen3_moe": {"head_dim": 24, "num_experts": 4, **EXPERTS},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0, **ALTERNATING},
    "gemma3_text": {"head_dim": 24, "query_pre_attn_scalar": 9, **ALTERNATING},
    "phi3": {"rope_parameters": PARTIAL},
    "gpt2": {"n_inner": 96, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rope_parameters": PARTIAL},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"attention_multiplier": 0.1, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "rope_parameters": PARTIAL},
}
"""What each family is special for; a family without an entry has no test."""


def tiny_teacher(family: str, **overrides: Any) -> PreTrainedModel:
    """A random teacher in fp32, frozen, whose biases and norms are far from what they would do nothing at."""
    described = FAMILIES[family]
    sizes = {**COMMON, **SPECIAL[family], **overrides}
    if described.key_heads is None:
        del sizes["num_key_value_heads"]
    if family == "gpt2":
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
        del sizes["intermediate_size"]
    config = getattr(transformers, described.config_class)(**sizes)
    if described.soft_cap is not None:
        config._attn_implementation = "eager"  # sdpa has no cap; load_teacher chooses the same
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, described.causal_lm)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if name.endswith("bias") else 0.2)
    return model.eval().requires_grad_(False)


class ExactConfig(MixerConfig):
    kind: Literal["exact"] = "exact"


class Exact(StudentMixer):
    """Softmax attention itself, written anew: a student with it must answer exactly like its teacher."""

    def __init__(self, config: ExactConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.unused = nn.Parameter(torch.zeros(3))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.unused)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return 0

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        batch, length = heads.q_BTHK.shape[:2]
        q, k, v = (x.float() for x in (heads.q_BTHK, heads.k_BTGK, heads.v_BTGV))
        if heads.rope is not None:
            q, k = heads.rope.rotate(q), heads.rope.rotate(k)
        real = torch.ones(batch, length, dtype=torch.bool) if heads.mask_BT is None else heads.mask_BT
        after = (k, v, real)
        if state is not None:
            after = tuple(torch.cat(pair, 1) for pair in zip(state, after, strict=True))
        k, v, real = after
        group = q.shape[2] // k.shape[2]
        q_BHTK, k_BHSK, v_BHSV = (
            x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
        )
        back = torch.arange(k.shape[1] - length, k.shape[1])[:, None] - torch.arange(k.shape[1])
        near = back >= 0 if self.shapes.window is None else (back >= 0) & (back < self.shapes.window)
        seen = near[None] & real[:, None]
        if heads.segments_BT is not None:
            seen = seen & (heads.segments_BT[:, :, None] == heads.segments_BT[:, None])
        score = (q_BHTK @ k_BHSK.transpose(-1, -2)) * self.shapes.scaling
        if self.shapes.soft_cap is not None:
            score = torch.tanh(score / self.shapes.soft_cap) * self.shapes.soft_cap
        weight = score.masked_fill(~seen[:, None], -1e30).softmax(-1)
        return (weight @ v_BHSV).transpose(1, 2).to(heads.v_BTGV.dtype), after


def ways_to_read(ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Arguments that go with the same tokens: as they are, left-padded in the first row, two documents a row."""
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    packed = torch.cat([torch.arange(40), torch.arange(ids.shape[1] - 40)]).expand_as(ids)
    return {"plain": {}, "padded": {"attention_mask": mask, "position_ids": places}, "packed": {"position_ids": packed}}


@torch.no_grad()
def read_in_all_ways(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Logits [N, V] of the real tokens, by way of reading."""
    found = {}
    for way, arguments in ways_to_read(ids).items():
        real = arguments.get("attention_mask", torch.ones_like(ids)).bool()
        found[way] = model(ids, use_cache=False, **arguments).logits[real]
    return found


def difference_of_ways(model: PreTrainedModel, change: Callable[[], object]) -> float:
    """Largest difference of logits before and after `change`, in all ways of reading 2 rows of 90 tokens."""
    ids = torch.randint(2, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(0))
    before = read_in_all_ways(model, ids)
    change()
    after = read_in_all_ways(model, ids)
    return max(float((after[way] - before[way]).abs().max()) for way in before)
