"""What every stage shares: its budget, its optimiser, and the protocol that `train.fit` drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.config import Config, Number, TokenCount
from linearize.families import ModelFamily
from linearize.mixers import StudentMixer
from linearize.stages.course import Course
from linearize.stages.parts import BASE_PARTS, Part, check_parts
from linearize.surgery import sliding_layers, trunk_of
from linearize.topk import TopK

Share = Annotated[Number, Field(gt=0, le=1)]
RowLength = Annotated[int, Field(ge=2)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Backward = Callable[[Tensor], None]

BY_DOCUMENT = "linearize_by_document"
"""transformers' name of the attention of packed.py."""

TAKE_MASKS = ("sdpa", BY_DOCUMENT)
"""Implementations of attention that take boolean masks."""


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens.

    Attributes:
        input_ids_BT: int64 tokens.
        position_ids_BT: int64; restarts at 0 where a document starts.
        segments_BT: int64 document number within the row; None when every row holds one document.
        target_mask_BT: True where the next token of the row belongs to the same document, and, in a conversation, to
            a reply, so that it is a target. The last column is always False.
        teacher: what the teacher makes of them, where that was cached.
        starts_S: int32; where documents start in the B·T tokens one after another, filled up with B·T. Given where
            softmax layers attend by it and need no mask (packed.py).
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segments_BT: Tensor | None
    target_mask_BT: Tensor
    teacher: TopK | None = None
    starts_S: Tensor | None = None

    def to(self, device: object) -> "Batch":
        """The same batch on another device; copies run asynchronously from pinned memory."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)  # type: ignore[call-overload]

        return Batch(
            input_ids_BT=move(self.input_ids_BT),
            position_ids_BT=move(self.position_ids_BT),
            segments_BT=None if self.segments_BT is None else move(self.segments_BT),
            target_mask_BT=move(self.target_mask_BT),
            teacher=None if self.teacher is None else TopK(*map(move, self.teacher)),
            starts_S=None if self.starts_S is None else move(self.starts_S),
        )

    @property
    def tokens(self) -> int:
        return self.input_ids_BT.numel()


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule."""

    lr: Number = Field(1e-3, gt=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: Number = Field(0.1, ge=0, lt=1, description="share of the steps with a linear warm-up")
    decay: Number = Field(0.1, ge=0, le=1, description="wsd: share of the steps that decay at the end")
    min_lr_ratio: Number = Field(0.1, ge=0, le=1, description="final learning rate / peak")
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Number = Field(0.0, ge=0)
    clip: Number | None = Field(1.0, gt=0, description="largest gradient norm; null = no clipping")


class Piece(NamedTuple):
    """A run of steps whose rows have one length. `rows` are those of a micro-batch, `tokens` those of its text."""

    steps: int
    length: int
    rows: int
    tokens: int


class StageConfig(Config):
    """Base of all stage configurations; `kind` names the stage in the STAGES table.

    With `lengths`, rows get longer (or shorter) as the stage goes on, and a step keeps its tokens: `batch` and
    `micro_batch` count rows of the longest length, which becomes `length`; a shorter one has as many more rows.
    """

    kind: str
    tokens: TokenCount = Field(gt=0, description="training tokens of this stage")
    length: int = Field(1024, ge=2, description="tokens per row")
    lengths: tuple[tuple[Share, RowLength], ...] = Field(
        (), description="[share of the steps, tokens per row] in order, such as [[0.5, 512], [0.5, 2048]]"
    )
    batch: int = Field(8, ge=1, description="rows per optimiser step")
    micro_batch: int = Field(8, ge=1, description="rows per forward; must divide batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: tuple[Part, ...] = Field(("mixer",), description="what trains: mixer, qkv, o, norms, lora or all")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="what a NaN or infinite loss or gradient does")
    max_skips: int = Field(5, ge=1, description="skip: a run of more such steps ends the stage")

    @model_validator(mode="before")
    @classmethod
    def _longest(cls, values: Any) -> Any:
        """`length` is the longest of `lengths`: what memory and held-out windows go by."""
        if not isinstance(values, dict) or not values.get("lengths") or "length" in values:
            return values
        try:
            return {**values, "length": max(length for _, length in values["lengths"])}
        except (TypeError, ValueError):
            return values  # the field's own check says what is wrong

    @field_validator("lengths")
    @classmethod
    def _whole_stage(cls, lengths: tuple[tuple[float, int], ...]) -> tuple[tuple[float, int], ...]:
        if lengths and abs(sum(share for share, _ in lengths) - 1) > 1e-6:
            raise ValueError(f"the shares add up to {sum(share for share, _ in lengths):g}, not to 1")
        longest = max((length for _, length in lengths), default=0)
        odd = [length for _, length in lengths if longest % length]
        if odd:
            raise ValueError(f"{longest} is no multiple of {odd[0]}: a step could not keep its number of tokens")
        return lengths

    @field_validator("train")
    @classmethod
    def _no_contradiction(cls, train: tuple[Part, ...]) -> tuple[Part, ...]:
        check_parts(train)
        return train

    @model_validator(mode="after")
    def _batch_divides(self) -> "StageConfig":
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        longest = max((length for _, length in self.lengths), default=self.length)
        if longest != self.length:
            raise ValueError(f"length is {self.length}, the longest of lengths {longest}; leave length out")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches only, so a budget smaller than one batch gives 0."""
        return self.tokens // (self.length * self.batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.batch // min(self.micro_batch, self.batch)

    def pieces(self) -> tuple[Piece, ...]:
        """The stage by row length, in order. The last piece takes the tokens that do not fill a step."""
        shares, rows = self.lengths or ((1.0, self.length),), min(self.micro_batch, self.batch)
        step_tokens = self.length * self.batch
        found: list[Piece] = []
        share_done, steps_done = 0.0, 0
        for number, (share, length) in enumerate(shares, 1):
            share_done += share
            until = self.steps if number == len(shares) else round(share_done * self.steps)
            tokens = (until - steps_done) * step_tokens
            found.append(Piece(until - steps_done, length, rows * (self.length // length), tokens))
            steps_done = until
        left_over = self.tokens - steps_done * step_tokens
        return (*found[:-1], found[-1]._replace(tokens=found[-1].tokens + left_over))

    @property
    def trains_base(self) -> bool:
        """Whether weights of the teacher are trained, so that the teacher needs a copy of its own."""
        return not BASE_PARTS.isdisjoint(self.train)

    @property
    def layers_train_alone(self) -> bool:
        """Whether no layer's gradient depends on another layer, so that processes may share the layers."""
        return False

    @property
    def changes(self) -> str:
        """What may differ in the work of two micro-batches of one shape, in words; empty where nothing does."""
        return ""

    def misfits(self, mixer: type[StudentMixer]) -> dict[str, str]:
        """What this stage cannot do with such a mixer: key of this configuration -> rule and remedy."""
        return {}

    def check_family(self, family: ModelFamily) -> None:
        """Refuse what this stage cannot do with a family's projections.

        Raises:
            RecipeError: with the rule.
        """


class PassEnds(Exception):
    """Ends a pass through a teacher behind the last layer that this process runs."""


OwnLayers = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]


class Stage(Protocol):
    """What `train.fit` needs of a stage."""

    name: str

    @property
    def config(self) -> StageConfig:
        """Budget and optimiser."""
        ...

    @property
    def course(self) -> Course:
        """What changes from step to step."""
        ...

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters this stage trains, by their names in the model. Everything else is frozen."""
        ...

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        """Compute the losses of one micro-batch, hand each to `backward`, and return detached scalar metrics.

        The stage calls `backward` itself so that it may do so once per layer and free that layer's activations.
        The metric `loss` must be there: its mean over the micro-batches is the step's loss.
        """
        ...

    def by_layer(self) -> Mapping[int, Mapping[str, nn.Parameter]]:
        """What trains, by student layer, where layers train on their own; empty where they train together."""
        ...

    def take_layers(self, layers: Sequence[int], own_layers: OwnLayers) -> None:
        """Train these layers only from now on; losses become this part's summands of the mean over all layers.

        Inside `own_layers(decoder layers)` a pass through the model runs a part of it and ends with PassEnds.
        """
        ...


def softmax_mask(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """Which keys softmax layers see in packed rows, bool [B, 1, T, T]; None leaves it to transformers.

    Left to itself transformers compares positions on the GPU, fetches the answer to the CPU, which waits for all that
    was launched, and makes this mask once for every pass. Rows of one document leave it that look: their attention is
    plainly causal, and its fastest kernel takes no mask. Layers that slide over a window need a mask of their own.
    Where layers attend by the documents' starts, a mask of no memory, which none of them reads, stands for it.
    """
    if batch.starts_S is not None:
        assert model.config._attn_implementation == BY_DOCUMENT, "starts are for `softmax_by_document`"
        rows, length = batch.input_ids_BT.shape
        return torch.ones((), dtype=torch.bool, device=batch.input_ids_BT.device).expand(rows, 1, length, length)
    if batch.segments_BT is None or model.config._attn_implementation not in TAKE_MASKS or sliding_layers(model):
        return None
    segments_BT, length = batch.segments_BT, batch.segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril_()
    return ((segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT)[:, None]


def run_trunk(model: PreTrainedModel, batch: Batch, mask_B1TT: Tensor | None = None) -> Tensor:
    """Final hidden states [B, T, D] of the decoder without its head, in the model's present mode.

    Args:
        mask_B1TT: what `softmax_mask` gives for this batch, for all passes over it.
    """
    packed = batch.segments_BT is not None
    documents: dict[str, Any] = {}
    if batch.starts_S is not None:
        documents = {"cu_seq_lens_q": batch.starts_S, "max_length_q": batch.input_ids_BT.shape[1]}
    output = trunk_of(model)(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT if packed else None,  # None: 0 to T - 1
        attention_mask=mask_B1TT,
        use_cache=False,
        segments_BT=batch.segments_BT,
        **documents,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
