"""Student mixers. One file each; this table is the only place that lists them."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from linearize.errors import RecipeError, unknown_name
from linearize.mixers.ahn import Ahn, AhnConfig
from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Rope, StudentMixer
from linearize.mixers.gdn import Gdn, GdnConfig
from linearize.mixers.hedgehog import Hedgehog, HedgehogConfig
from linearize.mixers.lawcat import Lawcat, LawcatConfig
from linearize.mixers.liger import Liger, LigerConfig
from linearize.mixers.lizard import Lizard, LizardConfig
from linearize.mixers.lolcats import Lolcats, LolcatsConfig
from linearize.mixers.mamba2 import Mamba2, Mamba2Config
from linearize.mixers.swa import Swa, SwaConfig
from linearize.mixers.t2r import T2r, T2rConfig
from linearize.mixers.taylor import Taylor, TaylorConfig

__all__ = [
    "MIXERS",
    "HeadInputs",
    "HeadShapes",
    "MixerConfig",
    "MixerState",
    "Rope",
    "StudentMixer",
    "build_mixer",
    "mixer_config",
]


class MixerEntry(NamedTuple):
    """A mixer's configuration class and its module class."""

    config: type[MixerConfig]
    module: type[StudentMixer]


MIXERS: dict[str, MixerEntry] = {
    "hedgehog": MixerEntry(HedgehogConfig, Hedgehog),
    "lawcat": MixerEntry(LawcatConfig, Lawcat),
    "lizard": MixerEntry(LizardConfig, Lizard),
    "liger": MixerEntry(LigerConfig, Liger),
    "lolcats": MixerEntry(LolcatsConfig, Lolcats),
    "mamba2": MixerEntry(Mamba2Config, Mamba2),
    "gdn": MixerEntry(GdnConfig, Gdn),
    "ahn": MixerEntry(AhnConfig, Ahn),
    "t2r": MixerEntry(T2rConfig, T2r),
    "taylor": MixerEntry(TaylorConfig, Taylor),
    "swa": MixerEntry(SwaConfig, Swa),
}


def mixer_config(values: dict[str, object]) -> MixerConfig:
    """Read a mixer configuration from plain data, such as the `linearize` entry of a config.json.

    Raises:
        RecipeError: when `kind` names no mixer, or the other values do not fit it.
    """
    kind = str(values.get("kind"))
    if kind not in MIXERS:
        raise RecipeError(unknown_name("mixer", kind, MIXERS), place="mixer.kind")
    try:
        return MIXERS[kind].config.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RecipeError(
            wrong, place=f"mixer {kind}", remedy="Another version of linearize may have set it."
        ) from None


def build_mixer(config: MixerConfig, shapes: HeadShapes) -> StudentMixer:
    """Construct a mixer with its initial values set."""
    return MIXERS[config.kind].module(config, shapes)
