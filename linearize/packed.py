"""Softmax over packed rows without a mask: a flash kernel that is told where documents start.

A mask of packed rows has T x T numbers a row, and no fast kernel of softmax takes one. The kernel used here (torch's
`varlen_attn`, FlashAttention-2, arXiv:2307.08691) reads a list of document starts instead, and skips what a token does
not see. transformers reaches it as an implementation of attention of our own, which is `sdpa` for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.families import family_of
from linearize.stages.base import BY_DOCUMENT, Batch
from linearize.surgery import Graft, base_model_type, sliding_layers
from linearize_kernels.backend import device_kind

WIDEST_HEAD = 256
OLDEST = (8, 0)  # compute capability
SHORTEST = 128
"""Tokens of a document, on average over a micro-batch and with those that fill its shape (`with_starts`), from which
on the kernel is worth it. It pads documents to blocks of as many in its backward pass, and starts a program for each
block that the longest document could have.
"""

HALVES = (torch.bfloat16, torch.float16)
TAKES_GROUPS = "enable_gqa" in signature(varlen_attn).parameters  # torch 2.11 wants as many key heads as query heads


def attend(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTV: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal softmax attention within documents, [B, T, H, V], in the call shape of transformers.

    Args:
        attention_mask: followed where no documents are told, as `sdpa` does; else ignored.
        cu_seq_lens_q: `Batch.starts_S`. What the kernel cannot do, such as dropout, gets a mask made of it.
        max_length_q: no document is longer.
    """
    heads = query_BHTK, key_BGTK, value_BGTV
    device = query_BHTK.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_BHTK.dtype
    if cu_seq_lens_q is None:
        stands_in = attention_mask is not None and attention_mask.stride()[-2:] == (0, 0)  # `softmax_mask`
        assert not stands_in, f"{type(module).__name__} was not handed where documents start"
    elif device_kind(query_BHTK) != "cuda" or dtype not in HALVES or dropout:
        attention_mask, cu_seq_lens_q = _mask(cu_seq_lens_q, query_BHTK.shape[0], query_BHTK.shape[2]), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, *heads, attention_mask, dropout=dropout, scaling=scaling, **others)
    assert max_length_q is not None
    q_LHK, k_LGK, v_LGV = (tensor_BHTK.transpose(1, 2).flatten(0, 1).to(dtype) for tensor_BHTK in heads)
    groups = q_LHK.shape[1] // k_LGK.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    if groups > 1 and TAKES_GROUPS:
        options["enable_gqa"] = True
    elif groups > 1:
        k_LGK, v_LGV = k_LGK.repeat_interleave(groups, 1), v_LGV.repeat_interleave(groups, 1)
    mixed = varlen_attn(q_LHK, k_LGK, v_LGV, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (query_BHTK.shape[0], -1)), None


def _mask(starts_S: Tensor, rows: int, length: int) -> Tensor:
    """What the kernel would follow, bool [B, 1, T, T]."""
    place_L = torch.arange(rows * length, device=starts_S.device)
    document_BT = torch.bucketize(place_L, starts_S, right=True).view(rows, length)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=starts_S.device).tril_()
    return ((document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT)[:, None]


ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def softmax_by_document(graft: Graft, mixed_precision: Literal["no", "bf16"]) -> Iterator[bool]:
    """Inside, softmax layers attend by `Batch.starts_S` where micro-batches have them; yields whether they can.

    They can on GPUs, in half precision, where all of them attend to all of a document.

    Args:
        mixed_precision: `bf16` where the forward runs under autocast.
    """
    configs = {id(model.config): model.config for model in (graft.model, graft.observed.model)}.values()
    able = _able(graft, torch.bfloat16 if mixed_precision == "bf16" else graft.observed.model.dtype)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs if able else ():
            config._attn_implementation = BY_DOCUMENT
        yield able
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _able(graft: Graft, computes: torch.dtype) -> bool:
    """Whether the kernel does what `sdpa` with a mask would do in every softmax layer."""
    model = graft.observed.model
    config, weight = model.config, model.get_input_embeddings().weight  # which no stream moves
    assert isinstance(weight, Tensor)
    lacks = weight.is_cuda and not (
        torch.backends.cuda.is_flash_attention_available()  # some builds of torch have the operation, but no kernel
        and torch.cuda.get_device_capability(weight.device) >= OLDEST
    )
    heads = [student.shapes for student in graft.students.values()]
    return (
        device_kind(weight) == "cuda"
        and not lacks
        and computes in HALVES
        and config._attn_implementation == "sdpa"
        and not sliding_layers(model)
        and family_of(base_model_type(model)).hands_on
        and all(head.key_width == head.value_width for head in heads)
        and all(head.key_width <= WIDEST_HEAD and head.key_width % 8 == 0 for head in heads)
    )


def with_starts(batch: Batch) -> Batch:
    """The batch, on the host, with the places where its documents start; without, where most are very short.

    Their number is filled up to a power of two with documents of no tokens, so that batches come in few shapes.
    """
    rows, length = batch.input_ids_BT.shape
    tokens = rows * length
    starts_N = torch.arange(0, tokens, length)
    if batch.segments_BT is not None:
        begins_BT = batch.segments_BT.diff(dim=1, prepend=batch.segments_BT[:, :1]) != 0
        begins_BT[:, 0] = True
        (starts_N,) = begins_BT.flatten().nonzero(as_tuple=True)
    documents = 2 ** (len(starts_N) - 1).bit_length()
    if documents * SHORTEST > tokens:
        return batch
    starts_S = torch.full((documents + 1,), tokens, dtype=torch.int32)
    starts_S[: len(starts_N)] = starts_N
    return replace(batch, starts_S=starts_S.pin_memory() if batch.input_ids_BT.is_pinned() else starts_S)
