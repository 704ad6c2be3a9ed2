"""A frozen configuration, read from the plain data of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

Read = TypeVar("Read", bound="Config")


class Config:
    """Fields are the annotations of the class; values that are not given are its defaults."""

    @classmethod
    def model_validate(cls: type[Read], values: Mapping[str, Any]) -> Read:
        """Read it.

        Raises:
            ValidationError: for a key that names no field.
        """
        fields = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
        if unknown := sorted(values.keys() - fields):
            raise ValidationError(f"{', '.join(unknown)}: Extra inputs are not permitted")
        config = cls()
        vars(config).update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")


Number = float
TokenCount = int
