"""Features of queries and of keys in one Triton launch, without a gradient. Legend in __init__.py; C tokens a tile.

Linear attention with a decay per feature reads them from memory; in plain torch they take nine launches a side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.gated_linear_attention.triton_maps import signed_features
from linearize_kernels.operations import operation, power
from linearize_kernels.tiles import key_flags, load_matrix, load_rows, load_vector, store_rows

Optional = Tensor | None


@triton.jit
def write_head(x, weight, bias, mask, out, token, first, length, H: tl.constexpr, width: tl.constexpr,
               features: tl.constexpr, K: tl.constexpr, F: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
               QUERY: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Features of a tile of one head's tokens, computed in fp32; 0 for keys that are masked."""
    BLOCK: tl.constexpr = K if K < 64 else 64  # of wider heads, matrix and tile would not fit the registers
    u = tl.zeros((C, F), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        x_tile = load_rows(x + start, first, token, length, width - start, C, BLOCK).to(tl.float32)
        matrix = load_matrix(weight + start * features, features, 1, width - start, features, BLOCK, F).to(tl.float32)
        u = tl.dot(x_tile, matrix, u, input_precision=PRECISION)
    if BIAS:
        u += load_vector(bias, features, F)[None, :]
    real = key_flags(mask, first, 0, length, C, MASKED)
    p, n = signed_features(u, real, features, MAP, QUERY, F, 2)
    store_rows(out, p, first, H * 2 * features, length, features, C, F)
    store_rows(out + features, n, first, H * 2 * features, length, features, C, F)


@triton.jit
def write_features(q, k, query_weight, key_weight, query_bias, key_bias, mask, q_out, k_out, q_batch, q_token, q_head,
                   k_batch, k_token, k_head, length, tiles, H: tl.constexpr, XQ: tl.constexpr, XK: tl.constexpr,
                   width: tl.constexpr, features: tl.constexpr, K: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
                   MAP: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Program (tile of a row's tokens, map); the maps of keys follow those of queries. XQ and XK input heads."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * C
    h = tl.program_id(1) % H
    matrix = h * width * features
    place = (b * length * H + h) * 2 * features
    mask += b * length
    if tl.program_id(1) < H:
        q += b * q_batch + (h // (H // XQ)).to(tl.int64) * q_head
        write_head(q, query_weight + matrix, query_bias + h * features, mask,
                   q_out + place, q_token, first, length, H, width, features, K, F, C, MAP, True, False, BIAS,
                   PRECISION)  # fmt: skip
    else:
        k += b * k_batch + (h // (H // XK)).to(tl.int64) * k_head
        write_head(k, key_weight + matrix, key_bias + h * features, mask,
                   k_out + place, k_token, first, length, H, width, features, K, F, C, MAP, False, MASKED, BIAS,
                   PRECISION)  # fmt: skip


def _empty(
    q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor, query_bias: Optional, key_bias: Optional,
    mask: Optional, feature_map: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    maps, _, features = query_weight.shape
    sizes = (*q.shape[:2], maps, 2 * features)
    return q.new_empty(sizes, dtype=dtype), q.new_empty(sizes, dtype=dtype)


@operation("hedgehog_features", _empty)
def features_op(
    q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor, query_bias: Optional, key_bias: Optional,
    mask: Optional, feature_map: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Features [B, T, H, 2F] of q and k in `dtype`.

    Heads have unit stride in the last dimension; maps and mask are contiguous. There is no gradient.
    """
    found = _empty(q, k, query_weight, key_weight, query_bias, key_bias, mask, feature_map, dtype)

    def bind() -> Bound:
        maps, width, features = query_weight.shape
        k_pad, f_pad = power(width), power(features)
        chosen = launch("write_features", torch.float32, max(k_pad, f_pad), feature_map)
        tiles = -(-q.shape[1] // chosen.chunk)
        exact = q.dtype == k.dtype == query_weight.dtype == key_weight.dtype == torch.bfloat16
        constants = {
            "H": maps, "XQ": q.shape[2], "XK": k.shape[2], "width": width, "features": features, "K": k_pad,
            "F": f_pad, "C": chosen.chunk, "MAP": feature_map, "MASKED": mask is not None,
            "BIAS": query_bias is not None, "PRECISION": "tf32" if exact else "tf32x3", "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }  # fmt: skip
        numbers = (*q.stride()[:3], *k.stride()[:3], q.shape[1], tiles)
        return Bound(write_features, (q.shape[0] * tiles, 2 * maps), numbers, constants, q.device)

    tensors = (q, k, query_weight, key_weight, query_bias, key_bias, mask)
    plan_for(("features", q.device, feature_map, dtype, *forms(*tensors)), bind)((*given(q, *tensors), *found))
    return found
