"""pydantic's names without its checks: what a checkpoint's config.json says was checked when it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ValidationError(ValueError):
    """Values that do not fit a configuration."""

    def errors(self) -> list[dict[str, Any]]:
        return [{"loc": (), "msg": str(self)}]


def Field(default: Any = None, **_rules: Any) -> Any:
    """The default alone."""
    return default


def model_validator(**_when: Any) -> Callable[[Any], Any]:
    """No check."""
    return lambda method: method


def field_validator(*_fields: str, **_when: Any) -> Callable[[Any], Any]:
    """No check."""
    return lambda method: method


def AfterValidator(check: Any) -> Any:
    """An annotation without effect."""
    return check


BeforeValidator = AfterValidator
