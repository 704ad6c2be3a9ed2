"""Compile the Triton kernels for an H100 (sm_90) without a GPU: registers, spills and shared memory of each.

    python scripts/compile_kernels.py

Every operation runs forward and backward on tensors of its real shapes; where a kernel would be launched it is compiled
instead, with the constants it would get. Exit status 1 where one does not compile, or asks for more shared memory than
the chip has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
os.environ["LINEARIZE_BACKEND"] = "auto"

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from linearize_kernels import (
    Branch,
    Far,
    FarStep,
    LinearState,
    LocalState,
    Near,
    NearStep,
    Sinks,
    Token,
    backend,
    causal_convs,
    configs,
    gated_linear_attention,
    hedgehog_attention,
    rotary,
    window_step,
    windowed_linear_attention,
)
from linearize_kernels.distillation_loss import LossWeights, distillation_terms
from linearize_kernels.gated_delta import gated_delta_rule
from linearize_kernels.gated_linear_attention.launch_blocks import BLOCKS_FROM
from linearize_kernels.hedgehog_attention import Map, features_of_both
from linearize_kernels.ssd import ssd

SHARED_MEMORY = 232_448
TOOLS = Path(nvidia.__file__).parent / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
BF16, FP32 = torch.bfloat16, torch.float32
B, T, H, G = 1, 640, 4, 2
"""Sizes that do not reach a kernel's code, but for whether there are several splits."""


def new(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.rand(sizes).to(dtype).requires_grad_()


def _documents() -> Tensor:
    return (torch.arange(T) // 100).expand(B, -1).contiguous()


def _hedgehog(width: int, dtype: torch.dtype, feature_map: Any = "softmax") -> list[Tensor]:
    q, k, v = new(B, T, H, width, dtype=dtype), new(B, T, G, width, dtype=dtype), new(B, T, G, width, dtype=dtype)
    maps = [Map(new(H, width, width, dtype=FP32)) for _ in range(2)]
    return [hedgehog_attention(q, k, v, *maps, feature_map)[0]]


def _hedgehog_with_all() -> list[Tensor]:
    q, k, v = new(B, T, H, 64), new(B, T, G, 64), new(B, T, G, 64)
    maps = [Map(new(H, 64, 64, dtype=FP32), new(H, 64, dtype=FP32)) for _ in range(2)]
    state = LinearState(new(B, H, 128, 64, dtype=FP32), new(B, H, 128, dtype=FP32))
    other = Branch(new(B, T, H, 64), new(B, T, H, dtype=FP32))
    gate, mask = new(B, T, H, dtype=FP32), torch.ones(B, T, dtype=torch.bool)
    y, end = hedgehog_attention(q, k, v, *maps, "softmax", gate, state, _documents(), mask, other=other)
    return [y, *end]


@torch.no_grad()
def _by_blocks(all_options: bool) -> list[Tensor]:
    """A long sequence that nobody differentiates; all options go by blocks where they are chosen, by default or not."""
    long = BLOCKS_FROM
    chosen = {name: configs.default(name, BF16, 128, "softmax none") for name in ("block_states", "block_outputs")}
    configs.overrides.update(chosen)
    q, k, v = new(B, long, H, 128), new(B, long, G, 128), new(B, long, G, 128)
    maps = [Map(new(H, 128, 128, dtype=FP32), new(H, 128, dtype=FP32) if all_options else None) for _ in range(2)]
    if not all_options:
        return [hedgehog_attention(q, k, v, *maps, last=True)[0]]
    state = LinearState(new(B, H, 256, 128, dtype=FP32), new(B, H, 256, dtype=FP32))
    other = Branch(new(B, long, H, 128), new(B, long, H, dtype=FP32))
    gate, mask = new(B, long, H, dtype=FP32), torch.ones(B, long, dtype=torch.bool)
    documents = (torch.arange(long) // 100).expand(B, -1).contiguous()
    return [hedgehog_attention(q, k, v, *maps, "softmax", gate, state, documents, mask, other=other)[0]]


def _gated(width: int, dtype: torch.dtype, per_channel: bool) -> list[Tensor]:
    q, k, v = (new(B, T, H, width, dtype=dtype) for _ in range(3))
    gate = new(B, T, H, *((width,) if per_channel else ()), dtype=FP32)
    return [gated_linear_attention(q, k, v, gate, None, _documents())[0]]


def _window(width: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = new(B, T, H, width, dtype=dtype), new(B, T, G, width, dtype=dtype), new(B, T, G, width, dtype=dtype)
    maps = [Map(new(H, width, width, dtype=FP32)) for _ in range(2)]
    sinks = Sinks(*(new(B, 1, 4, G, width, dtype=dtype) for _ in range(2)))
    near = Near(q, k, v, sinks, new(H, 4, dtype=FP32))
    return [windowed_linear_attention(near, Far(q, k, v, *maps), 64)[0]]


def _ssd(dtype: torch.dtype) -> list[Tensor]:
    q, k, v = new(B, T, H, 128, dtype=dtype), new(B, T, G, 128, dtype=dtype), new(B, T, G, 64, dtype=dtype)
    return [ssd(q, k, v, new(B, T, H, dtype=FP32), new(B, T, H, dtype=FP32))[0]]


def _delta(width: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (new(B, T, heads, width, dtype=dtype) for heads in (H, G, G))
    gates = [new(B, T, G, dtype=FP32) for _ in range(2)]
    return list(gated_delta_rule(q, k, v, *gates, new(B, G, width, width, dtype=FP32)))


def _convolutions(dtype: torch.dtype) -> list[Tensor]:
    xs = [new(B, T, heads, 64, dtype=dtype) for heads in (H, G)]
    taps = [new(heads, 64, 4, dtype=FP32) for heads in (H, G)]
    ys, ends = causal_convs(xs, taps, torch.arange(T).expand(B, -1).contiguous(), activation="silu")
    return [*ys, *ends]


def _rotary(dtype: torch.dtype) -> list[Tensor]:
    angle = torch.rand(1, T, 64)
    return list(rotary(new(B, T, H, 64, dtype=dtype), new(B, T, G, 64, dtype=dtype), angle.cos(), angle.sin()))


def _distillation(dtype: torch.dtype) -> list[Tensor]:
    student, teacher = (new(T, 49152, dtype=dtype).detach() for _ in range(2))
    mask = torch.ones(T, dtype=torch.bool)
    distillation_terms(student, teacher, torch.zeros(T, dtype=torch.int64), mask, LossWeights(1.0, 0.5, 2.0))
    return []


def _features(dtype: torch.dtype, width: int) -> list[Tensor]:
    with torch.no_grad():
        maps = [Map(new(H, width, width // 2, dtype=FP32)) for _ in range(2)]
        features_of_both(
            new(B, T, H, width, dtype=dtype), new(B, T, H, width, dtype=dtype), *maps, "softmax", None, dtype
        )
    return []


def _steps(width: int) -> list[Tensor]:
    """One token after a state, which nobody differentiates."""
    with torch.no_grad():
        q, k, v = new(8, 1, 32, width), new(8, 1, 8, width), new(8, 1, 8, width)
        features, gate = new(8, 1, 32, width), new(8, 1, 32, width, dtype=FP32)
        state = LinearState(new(8, 32, width, width, dtype=FP32), new(8, 32, width, dtype=FP32))
        gated_linear_attention(q, features, v, gate, state)
        maps = [Map(new(32, width, width, dtype=FP32)) for _ in range(2)]
        signed = LinearState(new(8, 32, 2 * width, width, dtype=FP32), new(8, 32, 2 * width, dtype=FP32))
        turned = (new(8, 1, width), new(8, 1, width))
        hedgehog_attention(q, k, v, *maps, log_gate_BTH=new(8, 1, 32, dtype=FP32), state=signed, angles=turned)
        _window_step(q, k, v, maps, signed)
        one = new(8, 1, 8, dtype=FP32)
        gated_delta_rule(q, k, v, one, one, new(8, 8, width, width, dtype=FP32))
    return []


def _window_step(q: Tensor, k: Tensor, v: Tensor, maps: list[Map], sums: LinearState) -> None:
    """With all options: kernels are known by their names."""
    width = q.shape[-1]
    tails, sinks = [new(8, 64, 8, width) for _ in range(3)], [new(8, 4, 8, width) for _ in range(2)]
    state = LocalState(torch.zeros(8, dtype=torch.int64), tails[0], tails[1], *sinks, tails[2])
    angles, gate = new(8, 1, width), new(8, 1, 32, dtype=FP32)
    token = Token(q, k, v, angles, angles, torch.ones(8, 1, dtype=torch.bool))
    weights = (new(32, dtype=FP32), new(32, dtype=FP32))
    near = NearStep(state, 0.1, True, new(32, 4, dtype=FP32))
    window_step(token, near, FarStep(maps[0], maps[1], sums, gate_B1H=gate), weights)


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "hedgehog 64": lambda: _hedgehog(64, BF16),
    "hedgehog 64, all options": _hedgehog_with_all,
    "hedgehog 128": lambda: _hedgehog(128, BF16),
    "hedgehog 128, by blocks": lambda: _by_blocks(False),
    "hedgehog 128, by blocks, all options": lambda: _by_blocks(True),
    "hedgehog 64, fp32": lambda: _hedgehog(64, FP32),
    "exp 80": lambda: _hedgehog(80, BF16, "exp"),
    "decay per channel 64": lambda: _gated(64, BF16, True),
    "decay per channel 128": lambda: _gated(128, BF16, True),
    "decay per channel 64, fp32": lambda: _gated(64, FP32, True),
    "decay 128": lambda: _gated(128, BF16, False),
    "window 64": lambda: _window(64, BF16),
    "window 128": lambda: _window(128, BF16),
    "window 64, fp32": lambda: _window(64, FP32),
    "ssd 128": lambda: _ssd(BF16),
    "ssd 128, fp32": lambda: _ssd(FP32),
    "delta 64": lambda: _delta(64, BF16),
    "delta 128": lambda: _delta(128, BF16),
    "delta 64, fp32": lambda: _delta(64, FP32),
    "convolutions": lambda: _convolutions(BF16),
    "features 64": lambda: _features(BF16, 64),
    "features 256": lambda: _features(BF16, 256),
    "features 64, fp32": lambda: _features(FP32, 64),
    "rotary": lambda: _rotary(BF16),
    "distillation loss": lambda: _distillation(BF16),
    "distillation loss, fp32": lambda: _distillation(FP32),
    "steps": lambda: _steps(128),
    "steps 64": lambda: _steps(64),
}


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes a thread keeps in local memory: spills
    shared: int
    matrix: int  # matrix instructions


class NotLaunched:
    """What a launch returns here."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


@contextmanager
def compiling_instead(found: dict[str, Compiled | str]) -> Iterator[None]:
    """Inside, kernels are compiled, not launched; what came of it, by the kernel's name."""

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> NotLaunched:
        name = f"{self.fn.__module__.split('.')[1]}.{self.fn.__name__}"
        if name not in found:
            try:
                found[name] = compile_kernel(self, dict(zip(self.arg_names, arguments, strict=False)), options)
            except Exception as error:  # any failure of the compiler is a finding
                found[name] = f"{type(error).__name__}: {str(error)[-200:]!r}"
        return NotLaunched()

    launch, decide = JITFunction.run, backend._decide
    JITFunction.run, backend._decide = run, lambda *_: True
    try:
        yield
    finally:
        JITFunction.run, backend._decide = launch, decide


def compile_kernel(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Compiled:
    """Compile as Triton's launcher would for these arguments: ones are constants, multiples of 16 are known to be."""
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    given = {**arguments, **options}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants |= {name for name, x in given.items() if isinstance(x, int) and not isinstance(x, bool) and x == 1}
    signature = {name: "constexpr" if name in constants else _type(given[name]) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and not isinstance(given[name], float)
        and (given[name].data_ptr() if isinstance(given[name], Tensor) else given[name]) % 16 == 0
    }  # fmt: skip
    source = ASTSource(kernel, signature, {name: given[name] for name in constants if name in given}, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    matrix = code.count("HGMMA") + code.count("HMMA")
    return Compiled(int(match[1]), int(match[2]), binary.metadata.shared, matrix)


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return "*" + TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32" if abs(argument) < 2**31 else "i64"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def compile_case(case: str) -> dict[str, Compiled | str]:
    """Every kernel that an operation and its gradients launch."""
    torch.manual_seed(0)
    found: dict[str, Compiled | str] = {}
    configs.overrides.clear()
    with compiling_instead(found):
        outputs = [x for x in CASES[case]() if x.requires_grad]
        if outputs:
            sum(x.float().sum() for x in outputs).backward()  # type: ignore[union-attr]
    return found


def main() -> int:
    """Print the table; 1 where something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case, may be repeated; default all")
    failed = 0
    print(
        "| case | kernel | registers | spilled bytes | shared memory | matrix instructions |\n|---|---|---|---|---|---|"
    )
    for case in parser.parse_args().case or CASES:
        for name, found in compile_case(case).items():
            if isinstance(found, str):
                failed += 1
                print(f"| {case} | {name} | {found} | | | |", flush=True)
                continue
            fits = found.shared <= SHARED_MEMORY
            failed += not fits
            print("|", " | ".join(map(str, (case, name, *found))), "|" if fits else "| does not fit", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
