"""What every frozen configuration shares: pydantic settings, token counts such as `2M`, numbers such as `1e-2`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class Config(BaseModel):
    """A frozen configuration. Unknown keys are refused; the reader adds file, place and the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_count(value: Any) -> Any:
    """Read a token count: an integer, or text such as `150k`, `2M`, `0.5B`.

    >>> parse_count("150k")
    150000
    """
    if isinstance(value, bool):
        raise ValueError(f"'{value}' is not a token count; write 150000, 150k, 2M or 1B")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmb]?)\s*", value.replace("_", "").lower())
    if match is None:
        raise ValueError(f"'{value}' is not a token count; write 150000, 150k, 2M or 1B")
    count = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(count):
        raise ValueError(f"'{value}' is too large for a token count")
    return round(count)


def refuse_number_as_text(value: Any) -> Any:
    """PyYAML (YAML 1.1) reads `1e-2` as text, because the mantissa has no point: say so instead of guessing."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number (got {value!r})")  # pydantic would take true for 1
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        if not math.isfinite(number):
            return value
        raise ValueError(f"YAML reads '{value}' as text, not as a number; write {number} or {number:.1e}")
    return value


TokenCount = Annotated[int, BeforeValidator(parse_count)]
Number = Annotated[float, BeforeValidator(refuse_number_as_text), Field(allow_inf_nan=False)]
