"""Feature maps in Triton, and their gradients. Legend in ../tiles.py; MAP "none" means that q and k are features.

A Hedgehog map makes two tiles of features, p of u = x W + b and n of -u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import NOTHING

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_FEATURE = tl.constexpr(1e-12)
MAX_EXPONENT = tl.constexpr(60.0)


@triton.jit
def map_features(x, weight, bias, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr,
                 SIGNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tiles p and n of features, [C, F] in the dtype of x, and u in fp32.

    Features that are padding are 0, and so are the keys of tokens that are not `real`.
    """
    if MAP == "none":
        p = x
        if not QUERY:
            p = tl.where(real[:, None], x, 0.0).to(x.dtype)
        n = p
        u = x
    else:
        u, p, n = hedgehog_map(x, weight, bias, real, features, MAP, QUERY, F, SIGNS, PRECISION)
    return p, n, u


@triton.jit
def hedgehog_map(x, weight, bias, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr,
                 SIGNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """u = x W + b in fp32, and the features of u and, where SIGNS = 2, of -u."""
    u = tl.dot(x, weight, input_precision=PRECISION) + bias[None, :]
    p, n = signed_features(u, real, features, MAP, QUERY, F, SIGNS)
    return u, p.to(x.dtype), n.to(x.dtype)


@triton.jit
def signed_features(u, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr, SIGNS: tl.constexpr):
    """Features [C, F] of u and, where SIGNS = 2, of -u, in fp32; 0 in the padding, and for keys that are not `real`."""
    plus = u
    minus = -u
    inside = tl.full((1, F), True, tl.int1)
    if features != F:
        inside = (tl.arange(0, F) < features)[None, :]
        plus = tl.where(inside, plus, NOTHING)
        minus = tl.where(inside, minus, NOTHING)
    if MAP == "softmax":
        p = softmax(plus, 1, real, QUERY)
        n = p
        if SIGNS == 2:
            below = u
            if features != F:
                below = tl.where(inside, u, -NOTHING)
            n = softmax(below, -1, real, QUERY)
    elif MAP == "softmax_joint":
        top = 2 * tl.maximum(tl.max(plus, 1), tl.max(minus, 1))
        p = tl.exp(2 * plus - top[:, None])
        n = tl.exp(2 * minus - top[:, None])
        scale = (1.0 / (tl.sum(p, 1) + tl.sum(n, 1)))[:, None]
        p = tl.maximum(p * scale, MIN_FEATURE)
        n = tl.maximum(n * scale, MIN_FEATURE)
    elif QUERY:
        top = tl.maximum(tl.max(plus, 1), tl.max(minus, 1))
        p = tl.maximum(tl.exp(plus - top[:, None]), MIN_FEATURE)
        n = tl.maximum(tl.exp(minus - top[:, None]), MIN_FEATURE)
    else:
        p = tl.exp(tl.minimum(plus, MAX_EXPONENT))
        n = tl.exp(tl.minimum(minus, MAX_EXPONENT))
    if features != F:
        p = tl.where(inside, p, 0.0)
        n = tl.where(inside, n, 0.0)
    if not QUERY and MAP != "softmax":
        p = tl.where(real[:, None], p, 0.0)
        n = tl.where(real[:, None], n, 0.0)
    return p, n


@triton.jit
def softmax(u, SIGN: tl.constexpr, real, QUERY: tl.constexpr):
    """softmax(SIGN u), [C, F]; no feature is below the smallest, and those of keys that are not `real` are 0: two
    numbers of a row say so, which is cheaper than to look at each feature.
    """
    slope: tl.constexpr = SIGN * LOG2_E
    top = tl.max(u, 1) if SIGN == 1 else tl.min(u, 1)
    p = tl.exp2(u * slope - (top * slope)[:, None])
    scale = 1.0 / tl.sum(p, 1)
    if QUERY:
        p = tl.maximum(p * scale[:, None], MIN_FEATURE)
    else:
        least = tl.where(real, MIN_FEATURE, 0.0)
        p = tl.maximum(p * tl.where(real, scale, 0.0)[:, None], least[:, None])
    return p


@triton.jit
def map_gradient(u, p, n, dp, dn, MAP: tl.constexpr, QUERY: tl.constexpr, SIGNS: tl.constexpr):
    """du of `map_features`."""
    if MAP == "none":
        du = dp
    else:
        p = p.to(tl.float32)
        n = n.to(tl.float32)
        dp = dp * p
        dn = dn * n
        if MAP == "exp" and not QUERY:
            du = tl.where(u < MAX_EXPONENT, dp, 0.0) - tl.where(-u < MAX_EXPONENT, dn, 0.0)
        else:
            # the smallest feature, rounded, may lie a little above MIN_FEATURE
            dp = tl.where(p > 1.01 * MIN_FEATURE, dp, 0.0)
            dn = tl.where(n > 1.01 * MIN_FEATURE, dn, 0.0)
            if MAP == "softmax":
                du = dp - p * tl.sum(dp, 1)[:, None]
                if SIGNS == 2:
                    du -= dn - n * tl.sum(dn, 1)[:, None]
            elif MAP == "softmax_joint":
                total = (tl.sum(dp, 1) + tl.sum(dn, 1))[:, None]
                du = 2 * (dp - p * total - (dn - n * total))
            else:
                du = dp - dn
    return du
