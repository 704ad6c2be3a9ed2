"""Model families. One small file each; this table is the only place that lists them."""

from __future__ import annotations

from linearize.errors import SurgeryError, unknown_name
from linearize.families.base import ModelFamily
from linearize.families.llama import LLAMA
from linearize.families.mistral import MISTRAL

__all__ = ["FAMILIES", "ModelFamily", "family_of"]

FAMILIES: dict[str, ModelFamily] = {family.model_type: family for family in (LLAMA, MISTRAL)}


def family_of(model_type: str) -> ModelFamily:
    """The family of a `config.model_type`.

    Raises:
        SurgeryError: when no family describes it; the known ones are listed.
    """
    if model_type not in FAMILIES:
        raise SurgeryError(
            unknown_name("model family", model_type, FAMILIES),
            place="config.model_type",
            remedy="A family is added as one file in linearize/families/.",
        )
    return FAMILIES[model_type]
