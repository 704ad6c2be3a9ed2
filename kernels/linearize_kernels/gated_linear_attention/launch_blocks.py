"""The kernels of triton_blocks.py: the forward walk where running states go through memory, one of a block of tokens.

Shape legend in __init__.py; N splits, M tokens of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, given
from linearize_kernels.configs import Launch, launch
from linearize_kernels.gated_linear_attention import triton_blocks as kernels

if TYPE_CHECKING:
    from linearize_kernels.gated_linear_attention.launch import Plan

PROGRAMS, MIN_SPLIT = 512, 256
"""Programs that `block_states` aims for, and tokens of a split at least."""

STATE_ROWS = 32
"""Rows of a state that a program of `split_states` adds up."""

Optional = Tensor | None


class BlockPlan:
    """Bound kernels of a plan whose launch table asks for blocks."""

    def __init__(self, plan: Plan, outputs: Launch) -> None:
        self.plan, self.outputs, self.size = plan, outputs, outputs.block
        self.states = launch("block_states", plan.dtype, plan.widest, plan.variant)
        self.blocks = -(-plan.length // self.size)
        splits = max(1, min(-(-PROGRAMS // (2 * plan.rows)), plan.length // MIN_SPLIT))
        self.blocks_a_split = -(-self.blocks // splits)
        self.splits = -(-self.blocks // self.blocks_a_split)
        self.constants = plan.constants | {"M": self.size, "RUN": outputs.run, "AHEAD": outputs.stages}
        self.bound: dict[tuple[Any, ...], Bound] = {}

    def kernel(self, name: str, **flags: bool) -> Bound:
        """A kernel of triton_blocks.py, bound; `flags` are the constants that depend on the call."""
        key = (name, *flags.values())
        found = self.bound.get(key)
        if found is None:
            found = self.bound[key] = self._bind(name, flags)
        return found

    def _bind(self, name: str, flags: dict[str, bool]) -> Bound:
        plan, constants = self.plan, self.constants | flags
        chosen = self.states if name == "block_states" else self.outputs
        numbers: tuple[int, ...] = (*plan.key_strides, plan.length, self.blocks_a_split, self.blocks)
        if name == "block_states":
            grid = (plan.rows, self.splits, 2)
        elif name == "block_outputs":
            grid, numbers = (
                (-(-plan.length // (chosen.chunk * chosen.run)), plan.rows, 1),
                (*plan.q_strides, *numbers, self.splits),
            )
        else:
            constants["ROWS"] = STATE_ROWS
            grid, numbers = (plan.rows, 2, -(-(plan.values + 1) // STATE_ROWS)), (self.splits,)
            chosen = Launch(0, 4, 1)
        function = getattr(kernels, name)
        constants["C"] = chosen.chunk
        constants = {key: value for key, value in constants.items() if key in function.arg_names}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        return Bound(function, grid, numbers, constants | options, plan.device)

    def new(self, number: int, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """`number` of something for each row of heads."""
        return self.plan.new(self.plan.rows, number, *sizes, dtype=dtype)


def walk_blocks(
    blocks: BlockPlan, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], maps: tuple[Optional, ...],
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional, epsilon: float, ended: bool,
) -> tuple[Tensor, Optional, Optional, Optional]:  # fmt: skip
    """Outputs, what they were multiplied by if not normalised (denominators), and the end state if `ended`."""
    plan = blocks.plan
    state, sizes = (2, plan.values, plan.features), (2, plan.features)
    states, norms, decays = (
        blocks.new(blocks.blocks, *state, dtype=plan.dtype), blocks.new(blocks.blocks, *sizes), blocks.new(blocks.blocks)
    )  # fmt: skip
    starts, start_norms = blocks.new(blocks.splits, *state, dtype=plan.dtype), blocks.new(blocks.splits, *sizes)
    sums, carry = blocks.new(blocks.splits, 2, plan.values + 1, plan.features), blocks.new(blocks.splits)
    rounded = [None if x is None else x.to(plan.dtype) for x in maps[:2]]
    query_weight, key_weight, query_bias, key_bias = given(q, *rounded, *maps[2:])
    blocks.kernel("block_states")((k, v, *masks, key_weight, key_bias, states, norms, decays, sums, carry))
    end_s, end_z = plan.new_state(2 // plan.signs) if ended else (None, None)
    blocks.kernel("split_states", STARTED=start_s is not None, ENDED=ended)(
        (sums, carry, *given(q, start_s, start_z), starts, start_norms, *given(q, end_s, end_z))
    )
    y, scale = plan.new_output(), None if plan.normalised else plan.new_scale()
    blocks.kernel("block_outputs", OTHER=other is not None, SCALED=scale is not None)(
        (q, k, v, *masks, query_weight, key_weight, query_bias, key_bias, *given(q, other, other_den),
         states, norms, decays, starts, start_norms, y, *given(q, scale)), epsilon,
    )  # fmt: skip
    return y, scale, end_s, end_z
