"""Time the kernels beside the libraries, all in one run on one GPU.

    python scripts/bench_kernels.py --out out/kernels

Ours, flash-linear-attention (when it is installed), torch's SDPA with flash attention and with cuDNN: milliseconds,
the shares of it that moving the inputs and outputs once and the matrix products would take, and peak memory. Ceilings
(a device copy, a matrix product) are measured in the same run. Prefill of a whole student of SmolLM2-135M's shape
against its teacher, random weights. Writes results.json and time.png.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize_kernels import Far, Near, gated_linear_attention, hedgehog_attention, windowed_linear_attention
from linearize_kernels.gated_linear_attention.triton_step import step_
from linearize_kernels.hedgehog_attention import Map

Call = Callable[[], Tensor]

SHAPES = {  # B, H, G, D, T
    "B4 H16 D64 T8192": (4, 16, 16, 64, 8192),
    "B8 H16 D64 T2048": (8, 16, 16, 64, 2048),
    "B1 H16 D64 T32768": (1, 16, 16, 64, 32768),
    "B1 H32 D128 T32768": (1, 32, 32, 128, 32768),
    "B4 H32 D128 T2048": (4, 32, 32, 128, 2048),
    "B4 H9/3 D64 T8192": (4, 9, 3, 64, 8192),
    "B1 H32/8 D128 T8192": (1, 32, 8, 128, 8192),
}
BACKWARD = ("B4 H16 D64 T8192", "B8 H16 D64 T2048", "B4 H9/3 D64 T8192")
MAIN = "B4 H16 D64 T8192"
OURS = ("hedgehog", "window of 64 + hedgehog", "per-channel decay + normaliser")
CURVE = (1024, 2048, 4096, 8192, 16384, 32768)


def median(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=100, return_mode="median"))


def in_graph(call: Callable[[], Any]) -> float:
    """The same, replayed from a CUDA graph; NaN where the call cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, rep=40, return_mode="median"))
    except RuntimeError as error:
        print(f"not captured: {str(error)[:200]}", flush=True)
        torch.cuda.synchronize()
        return float("nan")


def ceilings() -> dict[str, float]:
    """Bytes and floating-point operations per second that this GPU reaches."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source))
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median(lambda: left @ right)
    return {"copy_tb_s": 2 * source.numel() / copy / 1e9, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


class Contender(NamedTuple):
    """What is timed, what gets gradients, the bytes of inputs and outputs, and the products it cannot do without."""

    call: Call
    leaves: list[Tensor]
    bytes: int
    flops: int


def contenders(shape: tuple[int, int, int, int, int]) -> dict[str, Contender]:
    """By name. Products of linear attention are counted for chunks of 64, those of softmax for half of the pairs."""
    batch, heads, groups, width, length = shape

    def new(count: int, *rest: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(batch, length, count, *rest, device="cuda", dtype=dtype).requires_grad_()

    q, k, v = new(heads, width), new(groups, width), new(groups, width)
    rows = batch * length * heads
    moved = 2 * batch * length * width * (2 * heads + 2 * groups)
    maps = [(torch.randn(heads, width, width, device="cuda") * width**-0.5).requires_grad_() for _ in range(2)]
    gate = (-0.1 * torch.rand(batch, length, groups, width, device="cuda")).requires_grad_()
    features = [x.detach().abs().requires_grad_() for x in (q, k)]
    linear = rows * (4 * 2 * width * width + 64 * 3 * width)
    mapped = linear + rows * 4 * width * width
    found = {
        "hedgehog": Contender(
            lambda: hedgehog_attention(q, k, v, Map(maps[0]), Map(maps[1]))[0], [q, k, v, *maps], moved, mapped
        ),
        "window of 64 + hedgehog": Contender(
            lambda: windowed_linear_attention(Near(q, k, v), Far(q, k, v, Map(maps[0]), Map(maps[1])), 64)[0],
            [q, k, v, *maps],
            moved,
            mapped + rows * 64 * 4 * width,
        ),
        "per-channel decay + normaliser": Contender(
            lambda: gated_linear_attention(*features, v, gate)[0],
            [*features, v, gate],
            moved + 4 * gate.numel(),
            rows * (4 * width * width + 64 * 2 * width),
        ),
    }
    turned = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def softmax(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=groups != heads)

        found[f"softmax, {name}"] = Contender(softmax, turned, moved, rows * length * 2 * width)
    if groups == heads:
        found |= fla(q, k, v, maps, moved, mapped)
    return found


def fla(q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor], moved: int, flops: int) -> dict[str, Contender]:
    """flash-linear-attention's way to the same; nothing where it is not installed."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        print(f"flash-linear-attention is left out: {error}")
        return {}

    def mapped(x: Tensor, weight: Tensor) -> Tensor:
        u = torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype))
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)

    def call() -> Tensor:
        y: Tensor = chunk_linear_attn(mapped(q, maps[0]), mapped(k, maps[1]), v, scale=1.0, normalize=True)[0]
        return y

    return {"fla, hedgehog": Contender(call, [q, k, v, *maps], moved, flops)}


def fla_gla(shape: tuple[int, int, int, int, int]) -> dict[str, Contender]:
    """Its per-channel decay, without normaliser. Tuning itself takes it minutes."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return {}
    batch, heads, _, width, length = shape
    size = (batch, length, heads, width)
    q, k, v = (torch.rand(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    gate = (-0.1 * torch.rand(size, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    rows = batch * length * heads
    flops = rows * (4 * width * width + 64 * 2 * width)
    call = lambda: chunk_gla(q, k, v, gate, scale=1.0)[0]  # noqa: E731
    return {"fla, gla without normaliser": Contender(call, [q, k, v, gate], 10 * rows * width, flops)}


def measure(found: Contender, backward: bool, top: dict[str, float]) -> dict[str, float]:
    """Milliseconds, also in a CUDA graph, where the host takes none; shares of the ceilings; memory beyond what was."""
    call = found.call
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        result = {"forward_ms": median(call), "forward_peak_mb": peak / 1e6}
        result["forward_graph_ms"] = in_graph(call)
    result["bytes_floor_share"] = found.bytes / top["copy_tb_s"] / 1e9 / result["forward_graph_ms"]
    result["matmul_share"] = found.flops / top["matmul_tflop_s"] / 1e9 / result["forward_graph_ms"]
    if backward:
        weight = torch.randn_like(call())

        def both() -> None:
            torch.autograd.grad(call(), found.leaves, weight)

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        result["both_peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        result["both_ms"] = median(both)
    return result


def host_time() -> float:
    """Microseconds of Python for one Hedgehog forward whose work on the GPU is nothing."""
    call = contenders((1, 4, 4, 64, 128))["hedgehog"].call
    with torch.no_grad():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(300):
            call()
        spent = time.perf_counter() - began
        torch.cuda.synchronize()
    return spent / 300 * 1e6


def decode(copy_tb_s: float) -> list[dict[str, float]]:
    """Microseconds of one normalised step in a CUDA graph, H32 D128, and what moving the state alone would take."""
    from triton.testing import do_bench_cudagraph

    found = []
    for batch in (1, 8, 32, 128):
        q, k, v = (torch.rand(batch, 1, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        s, z = torch.rand(batch, 32, 128, 128, device="cuda"), torch.rand(batch, 32, 128, device="cuda")
        y = torch.empty_like(v)
        spent = 1e3 * do_bench_cudagraph(lambda: step_(q, k, v, None, s, z, y), return_mode="median")  # noqa: B023
        floor = 2 * 4 * (s.numel() + z.numel()) / copy_tb_s / 1e6
        found.append({"batch": batch, "us": spent, "floor_us": floor, "ratio": spent / floor})
        print("decode", found[-1], flush=True)
    return found


def print_host_profile(call: Call) -> None:
    """Where Python spends its time in a call that waits for no kernel."""
    profile = cProfile.Profile()
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        profile.enable()
        for _ in range(5):
            call()
        profile.disable()
    torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def prefill(recipe: str, host_profile: bool = False) -> list[dict[str, Any]]:
    """Milliseconds of one forward over T tokens, student and SDPA teacher of SmolLM2-135M's shape, bf16; also replayed
    from a CUDA graph, where neither waits for the host.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from linearize.attention import StudentAttention
    from linearize.recipe import load_recipe
    from linearize.surgery import graft, plan_surgery

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(device="cuda", dtype=torch.bfloat16).eval()
    found = []
    lengths = [2048, 4096, 8192, 32768]

    def run(length: int) -> dict[str, float]:
        tokens = torch.randint(0, 49152, (1, length), device="cuda")
        call = lambda: model(tokens, logits_to_keep=1, use_cache=False)  # noqa: E731
        with torch.no_grad():
            return {"ms": median(call), "graph_ms": in_graph(call)}

    teacher = {length: run(length) for length in lengths}
    chosen = load_recipe(recipe)
    graft(model, plan_surgery(model, chosen.mixer, chosen.keep_softmax))
    model.to(device="cuda", dtype=torch.bfloat16)
    layers = sum(isinstance(module, StudentAttention) for module in model.modules())
    for length in lengths:
        row = {"recipe": recipe, "layers": layers, "T": length}
        found.append(row | {f"teacher_{name}": x for name, x in teacher[length].items()} | run(length))
        print(found[-1], flush=True)
    if host_profile:
        tokens = torch.randint(0, 49152, (1, lengths[0]), device="cuda")
        print_host_profile(lambda: model(tokens, logits_to_keep=1, use_cache=False).logits)
    return found


def measure_curve(skip: list[str]) -> dict[str, dict[int, float]]:
    """Milliseconds of a forward in a CUDA graph, by contender and T: launched, short ones would show the host."""
    curve: dict[str, dict[int, float]] = {}
    for length in CURVE:
        for name, contender in contenders((1, 16, 16, 64, length)).items():
            if name not in skip:
                with torch.no_grad():
                    curve.setdefault(name, {})[length] = in_graph(contender.call)
    return curve


def draw(curve: dict[str, dict[int, float]], out: Path) -> None:
    """Time against T, and where each of ours gets faster than cuDNN."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for name, times in curve.items():
        axes.plot(list(times), list(times.values()), marker="o", label=name)
    softmax, ours = curve["softmax, cudnn"], curve["hedgehog"]
    slower = [length for length in CURVE if not ours[length] < softmax[length]]
    crossing = next((length for length in CURVE if length > max(slower, default=0)), None)
    if crossing:
        axes.axvline(crossing, color="grey", linestyle=":", label=f"hedgehog faster than cuDNN from {crossing}")
    axes.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward in a CUDA graph", title="B1 H16 D64, bf16"
    )
    axes.legend(fontsize="small", framealpha=0.5)
    figure.savefig(out / "time.png", dpi=120, bbox_inches="tight")


def ratios(shapes: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Ours against each of the others: times in the same run, divided."""
    lines = []
    for shape, rows in shapes.items():
        for name in OURS:
            for other, row in rows.items():
                if other not in OURS:
                    found = [
                        f"{key} {rows[name][key] / row[key]:.2f}"
                        for key in ("forward_ms", "forward_graph_ms", "both_ms")
                        if key in rows.get(name, {}) and key in row
                    ]
                    lines.append(f"{shape}: {name} / {other}: " + ", ".join(found))
    return lines


def main() -> int:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/kernels", help="folder for results.json and time.png")
    parser.add_argument("--prefill", action="append", default=None, help="recipes whose prefill is timed")
    parser.add_argument("--prefill-only", action="store_true", help="time nothing else; not even draw")
    parser.add_argument("--host-profile", action="store_true", help="print where Python's time goes in prefill")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this row, may be repeated")
    parser.add_argument("--skip", action="append", default=[], help="a contender by name, may be repeated")
    options = parser.parse_args()
    shapes = {shape: SHAPES[shape] for shape in options.shape or SHAPES}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "host_us": host_time(),
    }
    recipes = options.prefill or ["hedgehog"]
    if options.prefill_only:
        print(record, flush=True)
        record["prefill"] = [row for recipe in recipes for row in prefill(recipe, options.host_profile)]
        (out / "results.json").write_text(json.dumps(record, indent=1))
        return 0
    top = ceilings()
    record |= top
    print(record, flush=True)
    record["decode H32 D128"] = decode(top["copy_tb_s"])
    record["shapes"] = {}

    def add(shape: str, name: str, contender: Contender) -> None:
        if name in options.skip:
            return
        try:
            row: dict[str, Any] = measure(contender, shape in BACKWARD, top)
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            row = {"error": str(error)[:200]}
        record["shapes"].setdefault(shape, {})[name] = row
        shown = {key: x if isinstance(x, str) else round(x, 3) for key, x in row.items()}
        print(shape, name, shown, flush=True)
        (out / "results.json").write_text(json.dumps(record, indent=1))

    for libraries in (False, True):  # flash-linear-attention after the others: it may tune itself for minutes
        for shape, sizes in shapes.items():
            for name, contender in contenders(sizes).items():
                if name.startswith("fla") == libraries:
                    add(shape, name, contender)
    if MAIN in shapes:
        for name, contender in fla_gla(SHAPES[MAIN]).items():
            add(MAIN, name, contender)
    print("\n".join(ratios(record["shapes"])), flush=True)
    record["curve B1 H16 D64"] = curve = measure_curve(options.skip)
    (out / "results.json").write_text(json.dumps(record, indent=1))
    draw(curve, out)
    record["prefill"] = [row for recipe in recipes for row in prefill(recipe, options.host_profile)]
    (out / "results.json").write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
