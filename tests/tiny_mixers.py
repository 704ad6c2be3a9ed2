"""Small mixers of every kind, and heads for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.mixers import MIXERS, HeadInputs, HeadShapes, MixerConfig, MixerState, Rope, StudentMixer, build_mixer
from linearize.mixers.ahn import AhnConfig
from linearize.mixers.gdn import GdnConfig
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.mixers.lawcat import LawcatConfig
from linearize.mixers.liger import LigerConfig
from linearize.mixers.lizard import LizardConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.mamba2 import Mamba2Config
from linearize.mixers.swa import SwaConfig
from linearize.mixers.t2r import T2rConfig
from linearize.mixers.taylor import TaylorConfig

CASES: dict[str, MixerConfig] = {name: entry.config() for name, entry in MIXERS.items()} | {
    "hedgehog-exp": HedgehogConfig(normalisation="exp"),
    "hedgehog-joint": HedgehogConfig(normalisation="softmax_joint"),
    "hedgehog-tied": HedgehogConfig(tied=True),
    "hedgehog-bias": HedgehogConfig(bias=True),
    "hedgehog-exp-tied-bias": HedgehogConfig(normalisation="exp", bias=True, tied=True),
    "hedgehog-no-rope": HedgehogConfig(rope=False),
    "hedgehog-narrow": HedgehogConfig(features=5),
    "hedgehog-wide": HedgehogConfig(features=24, bias=True),
    "hedgehog-kaiming": HedgehogConfig(start="kaiming"),
    "lawcat-scalar": LawcatConfig(gate="scalar", tied_conv=True),
    "lawcat-untied": LawcatConfig(tied=False, kernel=2, features=5, normalisation="exp"),
    "lawcat-kernel-1": LawcatConfig(kernel=1),
    "lawcat-rope": LawcatConfig(rope=True, normalisation="softmax_joint"),
    "lawcat-window": LawcatConfig(window=7),
    "lizard-small": LizardConfig(window=7, sinks=3, gate="head", features=5),
    "lizard-bare": LizardConfig(window=33, meta=0),
    "lizard-published": LizardConfig(published=True),
    "lizard-published-small": LizardConfig(published=True, window=5, gate="head", meta=2, normalisation="exp"),
    "lolcats-small": LolcatsConfig(window=5, sinks=2, affine=True),
    "lolcats-one": LolcatsConfig(window=1, normalisation="exp", features=5),
    "liger-small": LigerConfig(window=7, sinks=3, normaliser=True),
    "mamba2-cosine": Mamba2Config(scores="cosine", maps=False),
    "mamba2-random": Mamba2Config(start="random"),
    "mamba2-mmmamba": Mamba2Config(variant="mmmamba"),
    "mamba2-mmmamba-random": Mamba2Config(variant="mmmamba", start="random", conv=4),
    "mamba2-mamba-in-llama": Mamba2Config(variant="mamba_in_llama"),
    "mamba2-mohawk": Mamba2Config(variant="mohawk"),
    "gdn-plain": GdnConfig(maps=False, gate=False),
    "gdn-conv": GdnConfig(conv=4),
    "gdn-published": GdnConfig(conv=4, activation="silu", norm="rms"),
    "gdn-rope": GdnConfig(rope=True, activation="none", gate=False, half_life=(64.0, 64.0)),
    "gdn-conv-rope": GdnConfig(conv=2, rope=True, maps=False),
    "ahn-small": AhnConfig(window=4, sinks=2),
    "ahn-one": AhnConfig(window=1, sinks=0, half_life=(2.0, 8.0)),
    "ahn-published": AhnConfig(published=True, window=33, sinks=5),
    "ahn-published-small": AhnConfig(published=True, window=5, sinks=0, half_life=(2.0, 8.0)),
    "t2r-wide": T2rConfig(features=40),
    "t2r-narrow": T2rConfig(features=5),
    "t2r-kaiming": T2rConfig(start="kaiming", features=32, rope=False),
    "taylor-narrow": TaylorConfig(features=7),
    "taylor-even": TaylorConfig(features=8, rope=False),
    "swa-small": SwaConfig(window=5, sinks=2),
    "swa-no-sinks": SwaConfig(window=2, sinks=0),
}
WIDTH, HEADS, KEY, VALUE = 32, 4, 16, 12  # V differs from K, so that a mix-up shows
LENGTHS = [1, 63, 64, 65, 1000]

every_mixer = pytest.mark.parametrize("case", CASES)


def shapes(key_heads: int = 2) -> HeadShapes:
    return HeadShapes(WIDTH, HEADS, key_heads, KEY, VALUE, KEY**-0.5)


def mixer_of(case: str, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> StudentMixer:
    """With parameters moved off their start, where some mistakes cancel."""
    torch.manual_seed(0)
    mixer = build_mixer(CASES[case], shapes(key_heads))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.to(dtype)


def rope_at(positions_BT: Tensor, dtype: torch.dtype = torch.float64) -> Rope:
    angle_BTR = positions_BT[..., None].double() * 10000.0 ** -(torch.arange(KEY // 2).double() / (KEY // 2))
    angle_BTR = torch.cat([angle_BTR, angle_BTR], dim=-1)
    return Rope(angle_BTR.cos().to(dtype), angle_BTR.sin().to(dtype))


def heads_of(length: int, key_heads: int = 2, dtype: torch.dtype = torch.float64, batch: int = 2) -> HeadInputs:
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(batch, length, *sizes, generator=generator, dtype=torch.float64).to(dtype)

    rope = rope_at(torch.arange(length).expand(batch, -1), dtype)
    return HeadInputs(draw(WIDTH), draw(HEADS, KEY), draw(key_heads, KEY), draw(key_heads, VALUE), rope=rope)


def cut(heads: HeadInputs, where: slice | Tensor, rows: slice = slice(None)) -> HeadInputs:
    """The heads of some tokens, of some rows."""

    def take(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows][:, where]

    assert heads.rope is not None
    rope = Rope(heads.rope.cos_BTR[rows][:, where], heads.rope.sin_BTR[rows][:, where])
    tensors = {name: take(value) for name, value in vars(heads).items() if name not in ("rope", "last")}
    return HeadInputs(**tensors, rope=rope)  # type: ignore[arg-type]


def close(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def same_state(left: MixerState, right: MixerState) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        close(one, other)
