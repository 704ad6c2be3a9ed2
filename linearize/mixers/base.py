"""What a mixer sees and returns.

Shape legend: B batch, T tokens, D model width, H query heads, G key/value heads (H = G * group), K key width,
V value width, F features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from linearize.config import Config
from linearize_kernels import rotary

MixerState = tuple[Tensor, ...]
"""A mixer's decoding state: batch-first tensors whose sizes do not depend on how many tokens were read."""

RowWeights = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the current tokens, as the teacher computed it (scaling included).

    `cos_BTR` and `sin_BTR` hold both halves (R rotated channels of K, the first R when the rotation is partial),
    in the half-split convention of Llama (arXiv 2104.09864).
    """

    cos_BTR: Tensor
    sin_BTR: Tensor

    def rotate(self, x_BTHK: Tensor) -> Tensor:
        """Rotate queries or keys [B, T, H, K]; returns the same shape and dtype."""
        cos, sin = self.cos_BTR[:, :, None], self.sin_BTR[:, :, None]
        width = cos.shape[-1]
        turned, kept = x_BTHK[..., :width], x_BTHK[..., width:]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
        return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned

    def rotate_both(
        self, q_BTHK: Tensor, k_BTGK: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries, times `scale`, and keys in one launch, in `dtype` or as they came; rounded once, unlike `rotate`."""
        return rotary(q_BTHK, k_BTGK, self.cos_BTR, self.sin_BTR, scale, dtype)


@dataclass(frozen=True)
class HeadInputs:
    """What a mixer sees: heads, never a Hugging Face module.

    q, k, v are taken before RoPE, after bias and q/k norm. Keys and values keep their G heads: query head h reads
    key/value head h // (H // G).
    """

    x_BTD: Tensor
    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGV: Tensor
    rope: Rope | None = None
    mask_BT: Tensor | None = None  # True = real token; None = all real
    segments_BT: Tensor | None = None  # document number of each token in a packed row; None = one document
    last: bool = False  # True: no tokens follow, and nobody reads the state that the mixer returns

    def seen(self, start: int, stop: int) -> Tensor:
        """Which keys query rows start..stop may see: bool, broadcastable to [B, H, stop - start, T]."""
        length, device = self.q_BTHK.shape[1], self.q_BTHK.device
        rows = torch.arange(start, stop, device=device)
        seen = (rows[:, None] >= torch.arange(length, device=device))[None, None]
        if self.segments_BT is not None:
            seen = seen & (self.segments_BT[:, None, start:stop, None] == self.segments_BT[:, None, None, :])
        if self.mask_BT is not None:
            seen = seen & self.mask_BT[:, None, None, :]
        return seen


@dataclass(frozen=True)
class HeadShapes:
    """The sizes a mixer is built for, and how its teacher scores."""

    width: int  # D
    query_heads: int  # H
    key_heads: int  # G
    key_width: int  # K
    value_width: int  # V
    scaling: float  # what the teacher multiplies q.k with, usually K ** -0.5
    soft_cap: float | None = None  # c of the teacher's c tanh(score / c)
    window: int | None = None  # keys that the teacher sees, its own the last; None = all
    rotates: bool = True  # False: heads of this layer come without RoPE


class MixerConfig(Config):
    """Base of all mixer configurations; `kind` names the mixer in the MIXERS table."""

    kind: str

    @property
    def window_beside_linear(self) -> int:
        """Keys that an exact branch attends to beside the linear one; 0 = the mixer does not have both."""
        return 0


@dataclass(frozen=True)
class Readings:
    """What a mixer's gates and branches do on given heads.

    Attributes:
        log_gate: log of the decay per token, [B, T, 1 or H or G] or, per channel, [B, T, H or G, F]; None = no gate.
        linear_share_BTH: the linear branch's share of the denominator (or of the mix), 0 to 1, NaN for queries that
            have no keys beyond the exact branch; None = one branch only.
    """

    log_gate: Tensor | None = None
    linear_share_BTH: Tensor | None = None


class StudentMixer(nn.Module):
    """A mixer maps heads to heads. It knows no Hugging Face module, no teacher and no loss.

    Whole sequence, split anywhere, and token by token must give the same outputs; a prefix must not change when the
    sequence grows. One contract test checks this for every entry of MIXERS.
    """

    rows: ClassVar[Literal["normalised", "matrix", "none"]] = "none"
    """What `row_weights` gives: rows that sum to 1, an unnormalised mixing matrix, or nothing."""

    linear_branch: bool = True
    window_branch: bool = True
    """False silences a branch of a mixer that has both, sinks with the window; set by `silenced`."""

    @abstractmethod
    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """Mix T tokens after `state`.

        Args:
            heads: current tokens only. Masked tokens neither write to the state nor are read.
            state: what an earlier call returned, or None at the start of a sequence.

        Returns:
            outputs [B, T, H, V] in the dtype of v, before the output projection; and the new state, whatever it is
            where `heads.last`.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set the initial values, so that the student starts near its teacher. Called once, after construction."""

    @abstractmethod
    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of decoding state per sequence and layer, where q, k, v come in `dtype`. Sums are fp32 in any case."""

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        """A function (start, stop) -> A [B, H, stop - start, T] of those query rows, features computed once.

        Each row sums to 1 where `rows` is "normalised" (for attention-weight objectives and diagnostics); where it is
        "matrix", A is what the mixer multiplies its values with (for matrix orientation, arXiv 2408.10189).

        Raises:
            NotImplementedError: where `rows` is "none".
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention weights")

    def readings(self, heads: HeadInputs) -> Readings:
        """What monitors and the seeding audit look at, on whole sequences from their start; nothing by default."""
        return Readings()


Branch = Literal["linear", "window"]


@contextmanager
def silenced(mixers: Iterable[StudentMixer], branch: Branch) -> Iterator[None]:
    """Inside, that branch of every mixer gives nothing, to measure what it is worth. All must have both branches."""
    before = [(mixer, mixer.linear_branch, mixer.window_branch) for mixer in mixers]
    try:
        for mixer, linear, window in before:
            mixer.linear_branch, mixer.window_branch = linear and branch != "linear", window and branch != "window"
        yield
    finally:
        for mixer, linear, window in before:
            mixer.linear_branch, mixer.window_branch = linear, window
