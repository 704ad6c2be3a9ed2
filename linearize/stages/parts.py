"""What a stage may train: named parts of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from linearize.adapters import lora_parameters
from linearize.surgery import Graft

Part = Literal["mixer", "qkv", "o", "norms", "lora", "all"]
Parameters = dict[str, nn.Parameter]

BASE_PARTS: frozenset[Part] = frozenset({"qkv", "o", "norms", "all"})
"""Those that hold weights of the teacher: with one of them, the teacher needs weights of its own."""


def _projections(graft: Graft, fields: Iterable[str]) -> Parameters:
    """Of the student layers; a projection's own weights, not those of an adapter around it."""
    adapters = lora_parameters(graft.model)
    wanted = {
        id(parameter)
        for student in graft.students.values()
        for name in fields
        for parameter in student.get_submodule(name).parameters()
    }
    return {
        name: parameter
        for name, parameter in graft.model.named_parameters()
        if id(parameter) in wanted and name not in adapters
    }


def _query_key_value(graft: Graft) -> Parameters:
    students = graft.students.values()
    return _projections(graft, {name for student in students for name in student.family.projections.names})


def _output(graft: Graft) -> Parameters:
    return _projections(graft, {student.family.output for student in graft.students.values()})


def _norms(graft: Graft) -> Parameters:
    """A norm is a module outside the mixers all of whose own parameters are vectors: no linear map, no embedding."""
    ours = {*graft.mixer_parameters(), *lora_parameters(graft.model)}
    found: Parameters = {}
    for path, module in graft.model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        if all(parameter.ndim == 1 for parameter in own.values()) and ours.isdisjoint(own):
            found |= own
    return found


PARTS: dict[Part, Callable[[Graft], Parameters]] = {
    "mixer": lambda graft: graft.mixer_parameters(),
    "qkv": _query_key_value,
    "o": _output,
    "norms": _norms,
    "lora": lambda graft: lora_parameters(graft.model),
    "all": lambda graft: dict(graft.model.named_parameters()),
}


def trained_parameters(graft: Graft, parts: Iterable[Part]) -> Parameters:
    """The parameters of the parts by their names in the model, each once: tied embeddings have one name."""
    found: Parameters = {}
    for part in parts:
        found |= PARTS[part](graft)
    return found


def check_parts(parts: tuple[Part, ...]) -> None:
    """Refuse a list that contradicts itself.

    Raises:
        ValueError: with the rule.
    """
    if not parts:
        raise ValueError(f"is empty: there is nothing to train; name some of {', '.join(PARTS)}")
    twice = sorted({part for part in parts if parts.count(part) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once")
    if "all" in parts and len(parts) > 1:
        others = ", ".join(part for part in parts if part != "all")
        raise ValueError(f"`all` is every parameter, so nothing can stand beside it (got {others} too)")
