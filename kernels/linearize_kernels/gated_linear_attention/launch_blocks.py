"""The kernels of triton_blocks.py: the forward walk where running states go through memory, one of a block of tokens.

For calls that nobody differentiates. Training keeps `walk_forward`: the backward walks need the sums of its splits.
States are freed when the call returns. They take 2 * V * F numbers of v's dtype for each block and query head: 64 KiB
for 128 tokens of a head of 128 in bf16, half of what q, k, v and y take of as many heads.

Shape legend in __init__.py; N splits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, given
from linearize_kernels.configs import Launch
from linearize_kernels.gated_linear_attention import triton_blocks as kernels

if TYPE_CHECKING:
    from linearize_kernels.gated_linear_attention.launch import Plan

BLOCKS_FROM = 2048
"""Tokens of a sequence, at least: the shortest that was measured."""

PROGRAMS, MIN_SPLIT = 256, 256
"""Programs that `block_states` aims for, and tokens of a split at least."""

SPLIT_STATES = Launch(0, 4, 1)
"""How `split_states`, which has no chunks, is launched."""

STATE_ROWS = 32
"""Rows of a state that a program of `split_states` adds up."""

Optional = Tensor | None


class BlockPlan:
    """What a plan's walk by blocks adds to it: how the sequence is cut, and bound kernels."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.outputs, self.states = plan.chosen("block_outputs"), plan.chosen("block_states")
        self.blocks = -(-plan.length // self.outputs.chunk)
        splits = max(1, min(-(-PROGRAMS // (2 * plan.rows)), plan.length // MIN_SPLIT))
        self.blocks_a_split = -(-self.blocks // splits)
        self.splits = -(-self.blocks // self.blocks_a_split)
        self.bound: dict[tuple[Any, ...], Bound] = {}

    def kernel(self, name: str, **flags: bool) -> Bound:
        """A kernel of triton_blocks.py, bound; `flags` are the constants that depend on the call."""
        found = self.bound.get((name, *flags.values()))
        if found is None:
            found = self.bound[name, *flags.values()] = self._bind(name, flags)
        return found

    def _bind(self, name: str, flags: dict[str, bool]) -> Bound:
        plan, outputs = self.plan, self.outputs
        cut = (plan.length, self.blocks_a_split, self.blocks)
        sides = (*plan.q_strides, *plan.key_strides)
        tiles = -(-(plan.values + 1) // STATE_ROWS)
        function, grid, numbers, chosen = {
            "block_states": (kernels.block_states, (plan.rows, self.splits, 2), (*plan.key_strides, *cut), self.states),
            "split_states": (kernels.split_states, (plan.rows, 2, tiles), (self.splits,), SPLIT_STATES),
            "block_outputs": (
                kernels.block_outputs,
                (self.blocks, plan.heads, plan.batch),
                (*sides, *cut, self.splits),
                outputs,
            ),
        }[name]
        own = {"C": chosen.chunk, "CHUNKS": outputs.chunk // self.states.chunk, "ROWS": STATE_ROWS}
        constants = {key: x for key, x in (plan.constants | flags | own).items() if key in function.arg_names}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        return Bound(function, grid, numbers, constants | options, plan.device)

    def new(self, number: int, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """`number` of something for each row of heads."""
        return self.plan.new(self.plan.rows, number, *sizes, dtype=dtype)


def by_blocks(plan: Plan) -> bool:
    """Whether calls of this plan go by blocks: where the walk would go through q, k and v once for each sign, in shape
    classes whose launch table has tokens for `block_outputs`.
    """
    if plan.passes == 1 or plan.gate_kind == "feature" or plan.length < BLOCKS_FROM:
        return False
    return plan.values > 16 and plan.chosen("block_outputs").chunk > 0  # 16: a fault of Triton's, see triton_blocks.py


def walk_blocks(
    blocks: BlockPlan, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], maps: tuple[Optional, ...],
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional, epsilon: float, ended: bool,
) -> tuple[Tensor, Optional, Optional, Optional]:  # fmt: skip
    """Outputs; denominators, if not normalised; and the end state, if `ended`."""
    plan = blocks.plan
    state, norm, counts = (2, plan.values, plan.features), (2, plan.features), (blocks.blocks, blocks.splits)
    states, starts = (blocks.new(count, *state, dtype=plan.dtype) for count in counts)
    norms, start_norms = (blocks.new(count, *norm) for count in counts)
    decays, carry = (blocks.new(count) for count in counts)
    sums = blocks.new(blocks.splits, 2, plan.values + 1, plan.features)
    rounded = [None if x is None else x.to(plan.dtype) for x in maps[:2]]  # once, not by every program
    query_weight, key_weight, query_bias, key_bias = given(q, *rounded, *maps[2:])
    blocks.kernel("block_states")((k, v, *masks, key_weight, key_bias, states, norms, decays, sums, carry))
    end_s, end_z = plan.new_state(plan.passes) if ended else (None, None)
    blocks.kernel("split_states", STARTED=start_s is not None, ENDED=ended)(
        (sums, carry, *given(q, start_s, start_z), starts, start_norms, *given(q, end_s, end_z))
    )
    y, scale = plan.new_output(), None if plan.normalised else plan.new_scale()
    blocks.kernel("block_outputs", OTHER=other is not None, SCALED=scale is not None)(
        (q, k, v, *masks, query_weight, key_weight, query_bias, key_bias, *given(q, other, other_den),
         states, norms, decays, starts, start_norms, y, *given(q, scale)), epsilon,
    )  # fmt: skip
    return y, scale, end_s, end_z
