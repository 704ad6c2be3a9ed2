"""Errors a user can act on: each says where, what was found, which rule it breaks, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LinearizeError(ValueError):
    """An error caused by input, not by us. The command line prints it as one paragraph and exits with code 2.

    Args:
        problem: what is wrong, one sentence, with the value that was found.
        place: where it was found (a file, a key, a layer); printed in front.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, *, place: str = "", remedy: str = "") -> None:
        self.problem, self.place, self.remedy = problem, place, remedy
        text = f"{place}: {problem}" if place else problem
        stop = "." if remedy and not text.endswith((".", "?", "!")) else ""
        super().__init__(f"{text}{stop} {remedy}".strip())


class RecipeError(LinearizeError):
    """A recipe, or a `--set` override of one, that cannot be used."""


class TeacherError(LinearizeError):
    """A teacher that cannot be found, fetched, read or used."""


class SurgeryError(LinearizeError):
    """A model that the planned surgery does not fit."""


class UnknownFamilyError(SurgeryError):
    """A model of a family that nobody has described; `proposal` is what looking into it found, for people to read."""

    def __init__(self, problem: str, *, place: str, remedy: str, proposal: str) -> None:
        super().__init__(problem, place=place, remedy=remedy)
        self.proposal = proposal


class DataError(LinearizeError):
    """Text that cannot be read, or that is too little."""


class RunError(LinearizeError):
    """A run that cannot start, go on or be written."""


class HubError(LinearizeError):
    """A student that cannot be put on the Hub."""


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; training stopped before the optimiser step."""


class OtherFailed(RunError):
    """Another process failed; of what, and which one."""


class MainFailed(OtherFailed):
    """What the main process said before it failed; the others end silently."""


class RunInterrupted(Exception):
    """The user stopped the run; a checkpoint was saved first. Not an error: the message says how to go on."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no `kind`, list the known ones and propose the nearest.

    >>> unknown_name("recipe", "hedgehod", ["hedgehog"])
    "unknown recipe 'hedgehod'; did you mean 'hedgehog'? Known: hedgehog."
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{name}'{hint} Known: {', '.join(names)}."
