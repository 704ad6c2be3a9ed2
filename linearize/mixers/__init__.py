"""Student mixers. One file each; this table is the only place that lists them."""

from __future__ import annotations

from typing import NamedTuple

from linearize.errors import RecipeError, unknown_name
from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Rope, StudentMixer
from linearize.mixers.hedgehog import Hedgehog, HedgehogConfig

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
}


def mixer_config(values: dict[str, object]) -> MixerConfig:
    """Read a mixer configuration from plain data, such as the `linearize` entry of a config.json.

    Raises:
        RecipeError: when `kind` names no mixer.
    """
    kind = str(values.get("kind"))
    if kind not in MIXERS:
        raise RecipeError(unknown_name("mixer", kind, MIXERS), place="mixer.kind")
    return MIXERS[kind].config.model_validate(values)


def build_mixer(config: MixerConfig, shapes: HeadShapes) -> StudentMixer:
    """Construct a mixer with its initial values set."""
    return MIXERS[config.kind].module(config, shapes)
