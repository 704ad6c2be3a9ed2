"""Compile the Triton kernels for an H100 (sm_90) without a GPU: registers, spills and shared memory of each.

    python scripts/compile_kernels.py

Exit status 1 where a kernel does not compile, or asks for more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linearize_kernels.configs import launch
from linearize_kernels.distillation_loss import triton as loss
from linearize_kernels.gated_linear_attention import triton as walk
from linearize_kernels.gated_linear_attention.launch import ONE_SIGN_FROM, power

SHARED_MEMORY = 232_448
KERNELS = ("add_up_splits", "walk_forward", "add_up_splits_backwards", "walk_query_gradients", "walk_key_gradients")
TOOLS = Path(nvidia.__file__).parent / "bin"


class Case(NamedTuple):
    """A shape class: what the operation is, and its widths."""

    feature_map: str
    gate: str
    width: int
    features: int
    values: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()  # flags of the kernels that are on


CASES = {
    "hedgehog 64": Case("softmax", "none", 64, 64, 64),
    "hedgehog 64, all options": Case(
        "softmax", "head", 64, 64, 64, options=("MASKED", "PACKED", "BIAS", "STARTED", "ENDED", "OTHER")
    ),
    "hedgehog 128": Case("softmax", "none", 128, 128, 128),
    "hedgehog 64, fp32": Case("softmax", "none", 64, 64, 64, torch.float32),
    "exp 80": Case("exp", "none", 80, 80, 80),
    "decay per channel 64": Case("none", "feature", 64, 64, 64, options=("PACKED",)),
    "decay per channel 128": Case("none", "feature", 128, 128, 128),
    "decay per channel 64, fp32": Case("none", "feature", 64, 64, 64, torch.float32),
    "decay 128": Case("none", "head", 128, 128, 64, options=("PACKED",)),
    "decay 128, fp32": Case("none", "head", 128, 128, 64, torch.float32),
    "features 256": Case("none", "none", 256, 256, 128),
}

LOSSES = {"distillation loss": torch.bfloat16, "distillation loss, fp32": torch.float32}
LOSS_TYPES = {
    "targets": "*i64", "mask": "*i1", "kl_weight": "fp32", "surprise_weight": "fp32", "heat": "fp32",
} | dict.fromkeys(("student", "teacher", "gradient", "kl_rows", "surprise_rows"), "*fp32")  # fmt: skip


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes a thread keeps in local memory: spills
    shared: int
    tensor_cores: int  # matrix instructions


def compile_kernel(name: str, case: Case) -> Compiled:
    """Compile one kernel as it would be launched."""
    function = getattr(walk, name)
    f, two = power(case.features), case.feature_map != "none"
    split = case.feature_map == "softmax" and f >= ONE_SIGN_FROM
    widest = max(power(case.width), f, power(case.values))
    chosen = launch(name, case.dtype, widest, f"{case.feature_map} {case.gate}")
    constants: dict[str, Any] = {
        "H": 16, "KH": 16, "VH": 16, "GH": 16, "width": case.width, "features": case.features, "values": case.values,
        "K": power(case.width), "F": f, "V": power(case.values), "E": f if case.gate == "feature" else 1,
        "C": chosen.chunk, "MAP": case.feature_map, "GATE": case.gate, "SIGNS": 2 if two and not split else 1,
        "TILED": "gradients" not in name, "NORMALISED": True,
        "PRECISION": "tf32" if case.dtype == torch.bfloat16 else "tf32x3",
    }  # fmt: skip
    if chosen.values and case.values % chosen.values == 0:
        constants["V"] = min(constants["V"], chosen.values)
    constants |= {flag: flag in case.options for flag in ("MASKED", "PACKED", "BIAS", "STARTED", "ENDED", "OTHER")}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {argument: _type(argument, case.dtype, constants) for argument in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") or argument.endswith(("_batch", "_token", "_head"))
    }
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    return _usage(ASTSource(function, signature, constants, aligned), options)


def compile_loss(name: str, dtype: torch.dtype) -> Compiled:
    """Compile the distillation loss with all its options, as it would be launched."""
    function = getattr(loss, name)
    chosen = launch(name, dtype, 16, "rows")
    constants = {"C": chosen.chunk, "WARM": True, "SURPRISED": True}
    signature = {
        argument: "constexpr" if argument in constants else LOSS_TYPES.get(argument, "i32")
        for argument in function.arg_names
    }
    if dtype == torch.bfloat16:
        signature |= dict.fromkeys(("student", "teacher", "gradient"), "*bf16")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    return _usage(ASTSource(function, signature, constants, aligned), options)


def _usage(source: ASTSource, options: dict[str, int]) -> Compiled:
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(int(found[1]), int(found[2]), kernel.metadata.shared, code.count("HGMMA") + code.count("HMMA"))


def _type(argument: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    """As the launcher finds it: maps, sums and states are fp32."""
    if argument in constants:
        return "constexpr"
    if argument == "epsilon":
        return "fp32"
    if argument.endswith(("_batch", "_token", "_head")) or argument in ("length", "chunks_a_split", "delay", "skip"):
        return "i32"
    if argument in ("mask", "segments"):
        return "*i1" if argument == "mask" else "*i64"
    inputs = ("q", "k", "v", "dy", "y", "other", "query_gradient", "key_gradient", "value_gradient")
    return "*bf16" if argument in inputs and dtype == torch.bfloat16 else "*fp32"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print the table; 1 where something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", choices=[*CASES, *LOSSES], help="one case, may be repeated; default all"
    )
    failed = 0
    print(
        "| case | kernel | registers | spilled bytes | shared memory | matrix instructions |\n|---|---|---|---|---|---|"
    )
    for case in parser.parse_args().case or [*CASES, *LOSSES]:
        for name in KERNELS if case in CASES else ("distillation_rows",):
            try:
                found = compile_kernel(name, CASES[case]) if case in CASES else compile_loss(name, LOSSES[case])
            except Exception as error:  # any failure of the compiler is a finding
                failed += 1
                print(f"| {case} | {name} | {type(error).__name__}: {str(error)[-200:]!r} | | | |", flush=True)
                continue
            fits = found.shared <= SHARED_MEMORY
            failed += not fits
            row = (case, name, found.registers, found.stack, found.shared, found.tensor_cores)
            print("|", " | ".join(map(str, row)), "|" if fits else "| does not fit", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
