"""What every frozen configuration shares: pydantic settings, token counts such as `2M`, numbers such as `1e-2`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class Config(BaseModel):
    """A frozen configuration. Unknown keys are refused; the reader adds file, place and the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1; a field with a reader of its own (TokenCount, Number) says it in its own words."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        types = _types(field.annotation)
        if bool in types or int not in types or any(isinstance(item, BeforeValidator) for item in field.metadata):
            return value
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, bool):
                raise ValueError(f"must be a whole number (got {item!r})")
        return value


def _types(annotation: Any) -> set[type]:
    """The plain types that an annotation is made of."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _types(parts[0])
    if origin is None:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_types, parts))


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
