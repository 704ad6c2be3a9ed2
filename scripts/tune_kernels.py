"""Choose how each kernel is launched on this GPU: every candidate is first checked, then timed.

    python scripts/tune_kernels.py --out kernels/linearize_kernels/configs.json

A candidate may win only if outputs and gradients on fresh random inputs stay within twice the error of the plainest
configuration, both against fp32 torch. Kernels are tuned one after the other, the others at their best so far.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize_kernels import configs, window_attention
from linearize_kernels.gated_linear_attention.chunk import chunk_linear_sums
from linearize_kernels.gated_linear_attention.launch import walk
from linearize_kernels.hedgehog_attention import hedgehog_features
from linearize_kernels.windowed_linear_attention.chunk import window_sums

FORWARD = ("add_up_splits", "walk_forward", "window_forward", "block_states", "block_outputs")
WALK = ("add_up_splits", "walk_forward", "add_up_splits_backwards", "walk_query_gradients", "walk_key_gradients")
BLOCKS = ("block_states", "block_outputs")
WINDOW = ("window_forward", "window_query_gradients", "window_key_gradients")
PLAIN = configs.Launch(32, 4, 1)
NOT_USED = configs.Launch(0, 1, 1)
WIDTH = 64  # of the window

CASES: dict[str, tuple[str, str, int, tuple[int, int, int]]] = {  # feature map or window, gate, head width, (B, H, T)
    "hedgehog 64": ("softmax", "none", 64, (4, 16, 8192)),
    "hedgehog 64, decay": ("softmax", "head", 64, (4, 16, 8192)),
    "hedgehog 128": ("softmax", "none", 128, (1, 32, 16384)),
    "hedgehog 128, by blocks": ("softmax", "none", 128, (1, 32, 16384)),
    "per-channel decay 64": ("none", "feature", 64, (4, 16, 8192)),
    "window 64": ("window", "none", 64, (4, 16, 8192)),
    "window 128": ("window", "none", 128, (1, 32, 16384)),
    "decay 64": ("none", "head", 64, (4, 16, 8192)),
    "per-channel decay 128": ("none", "feature", 128, (1, 32, 16384)),
    "decay 128": ("none", "head", 128, (1, 32, 16384)),
}


def kernels_of(case: str) -> tuple[str, ...]:
    return WINDOW if CASES[case][0] == "window" else BLOCKS if case.endswith("by blocks") else WALK


def candidates(kernel: str, width: int, gate: str) -> list[configs.Launch]:
    """Every tile, warp and stage count worth a try."""
    chunks = (32, 64) if gate == "feature" or "gradients" in kernel else (32, 64, 128)
    if kernel == "block_outputs":
        chunks = (128,)  # a multiple of what `block_states` may choose; shorter blocks take more memory
    tiles = (0, 64) if kernel in WALK[:2] and width > 64 else (0,)
    warps = (4,) if width <= 64 else (4, 8)
    return [
        configs.Launch(chunk, count, stages, tile)
        for chunk in chunks
        for count in (*warps, *((8,) if chunk == 128 and width <= 64 else ()))
        for stages in (1, 2, 3)
        for tile in tiles
    ]


def inputs(case: str, length: int | None = None) -> dict[str, Any]:
    """Random tensors of a case, gradients on."""
    feature_map, gate, width, (batch, heads, tokens) = CASES[case]
    tokens = length or tokens
    made = {name: torch.randn(batch, tokens, heads, width, device="cuda") for name in "qkv"}
    if feature_map == "none":
        made["q"], made["k"] = made["q"].abs(), made["k"].abs()
    made = {name: x.bfloat16() for name, x in made.items()}
    made["gate"] = None
    if gate != "none":
        shape = (batch, tokens, heads, width)[: 3 if gate == "head" else 4]
        made["gate"] = -0.1 * torch.rand(shape, device="cuda")
    for name in ("query_weight", "key_weight"):
        made[name] = (
            None if feature_map in ("none", "window") else torch.randn(heads, width, width, device="cuda") * width**-0.5
        )
    for x in made.values():
        if x is not None:
            x.requires_grad_()
    return made


def run(case: str, made: dict[str, Any]) -> Tensor:
    """The operation's outputs."""
    if CASES[case][0] == "window":
        return window_attention(made["q"], made["k"], made["v"], WIDTH).o_BTHV
    maps = (made["query_weight"], made["key_weight"], None, None)
    rest = (None, None, None, None, CASES[case][0], True, 0.0, 0, 0, False)
    y: Tensor = walk(made["q"], made["k"], made["v"], made["gate"], None, None, *maps, *rest)[0]
    return y


def reference(case: str, made: dict[str, Any]) -> Tensor:
    """The same in fp32 torch."""
    q, k, v = (made[name].float() for name in "qkv")
    feature_map = CASES[case][0]
    if feature_map == "window":
        place_BT = torch.arange(q.shape[1], device="cuda").expand(q.shape[0], -1)
        num, den, _ = window_sums(q, k, v, place_BT, WIDTH)
        return num / den.unsqueeze(-1)
    if feature_map != "none":
        q = hedgehog_features(q, made["query_weight"], None, feature_map, "query")  # type: ignore[arg-type]
        k = hedgehog_features(k, made["key_weight"], None, feature_map, "key")  # type: ignore[arg-type]
    num, den, _ = chunk_linear_sums(q, k, v, made["gate"])
    return num / den.unsqueeze(-1)


def checked(case: str, how: Any, made: dict[str, Any], weight: Tensor) -> list[Tensor]:
    """What `how`, `run` or `reference`, returns; with gradients, but for kernels that only run without."""
    if kernels_of(case) == BLOCKS:
        with torch.no_grad():
            return [how(case, made).float()]
    return with_gradients(how(case, made), made, weight)


def with_gradients(y: Tensor, made: dict[str, Any], weight: Tensor) -> list[Tensor]:
    leaves = [x for x in made.values() if x is not None]
    return [y.float(), *(x.float() for x in torch.autograd.grad(y, leaves, weight.to(y.dtype)))]


def errors(case: str, made: dict[str, Any], exact: list[Tensor], weight: Tensor) -> list[float]:
    """Relative errors of outputs and gradients."""
    found = checked(case, run, made, weight)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def use(case: str, chosen: dict[str, configs.Launch]) -> None:
    configs.overrides.clear()
    configs.overrides.update({"block_outputs": NOT_USED} | chosen)


def compile_one(job: tuple[str, dict[str, configs.Launch], bool]) -> str:
    """Compile in a process of its own, so that many compile at once; Triton's cache keeps the result."""
    case, chosen, backward = job
    try:
        use(case, chosen)
        made = inputs(case)
        with torch.set_grad_enabled(kernels_of(case) != BLOCKS):
            y = run(case, made)
        if backward:
            with_gradients(y, made, torch.randn_like(y))
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit the chip
        return f"{type(error).__name__}: {error}"[:100]
    return ""


def time_it(case: str, made: dict[str, Any], backward: bool) -> float:
    """Milliseconds, the median."""
    from triton.testing import do_bench

    if not backward:
        with torch.no_grad():
            return float(do_bench(lambda: run(case, made), warmup=15, rep=50, return_mode="median"))
    y = run(case, made)
    weight, leaves = torch.randn_like(y), [x for x in made.values() if x is not None]
    call = lambda: torch.autograd.grad(y, leaves, weight, retain_graph=True)  # noqa: E731
    return float(do_bench(call, warmup=15, rep=50, return_mode="median"))


def tune(case: str, pool: ProcessPoolExecutor, table: dict[str, list[int]]) -> None:
    """The best configuration of each kernel for this case."""
    feature_map, gate, width, _ = CASES[case]
    variant = "window" if feature_map == "window" else f"{feature_map} {gate}"
    best = {kernel: configs.default(kernel, torch.bfloat16, width, variant) for kernel in kernels_of(case)}
    tokens = 3056 if kernels_of(case) == BLOCKS else 1008  # a chunk that is not full
    small = inputs(case, tokens)  # the same compiled kernels as for the long one
    weight = torch.randn(small["v"].shape, device="cuda")
    exact = checked(case, reference, small, weight)
    use(case, dict.fromkeys(best, PLAIN if width <= 64 else PLAIN._replace(warps=8)))
    allowed = [2 * error + 1e-5 for error in errors(case, small, exact, weight)]
    made = inputs(case)
    for kernel in best:
        options = candidates(kernel, width, gate)
        jobs = [(case, {**best, kernel: option}, kernel not in FORWARD) for option in options]
        times: dict[configs.Launch, float] = {}
        for option, obstacle in zip(options, list(pool.map(compile_one, jobs)), strict=True):
            if obstacle:
                print(f"  {kernel} {tuple(option)}: {obstacle}")
                continue
            use(case, {**best, kernel: option})
            wrong = [e for e, limit in zip(errors(case, small, exact, weight), allowed, strict=True) if not e <= limit]
            if wrong:
                print(f"  {kernel} {tuple(option)}: WRONG, relative errors {wrong}")
                continue
            times[option] = time_it(case, made, kernel not in FORWARD)
        ranking = sorted(times, key=lambda option: times[option])
        best[kernel] = ranking[0]
        print(f"{case}: {kernel}", *(f"{tuple(option)} {times[option]:.3f} ms" for option in ranking[:3]), flush=True)
        table[configs.key(kernel, torch.bfloat16, width, variant)] = list(best[kernel])


def main() -> int:
    """Tune all cases; the table is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(configs.TABLE), help="the table to write")
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case, may be repeated")
    parser.add_argument("--jobs", type=int, default=12, help="compilations side by side")
    options = parser.parse_args()
    out = Path(options.out)
    table = json.loads(out.read_text()) if out.is_file() else {}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case in options.case or CASES:
            tune(case, pool, table)
            lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
            out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
