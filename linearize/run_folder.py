"""The output folder: the student at its top, the run that made it under `run/`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from linearize.distributed import ALONE, Processes
from linearize.errors import RunError

SAME = ("model", "quantize", "recipe_hash", "text", "seed")
"""Facts that a resumed run must share with the run it goes on with."""


MOST_NAMED = 5
"""Values of a recipe that a message names."""


@dataclass(frozen=True)
class RunFolder:
    """Where a conversion writes."""

    student: Path  # the Hugging Face folder
    processes: Processes = ALONE  # every one calls, the main one reads and writes
    replaces: bool = False  # a former run lies here still; `begin` deletes it

    @property
    def run(self) -> Path:
        """Checkpoints, metrics.jsonl, run.json and results.json."""
        return self.student / "run"

    @property
    def facts_file(self) -> Path:
        return self.run / "run.json"

    @property
    def results_file(self) -> Path:
        return self.run / "results.json"

    def facts(self) -> dict[str, Any]:
        """What the run began with; empty before it did."""
        return {} if self.replaces else self.processes.on_main(lambda: read_json(self.facts_file))

    def results(self) -> dict[str, Any]:
        """What was measured so far, by name."""
        return {} if self.replaces else self.processes.on_main(lambda: read_json(self.results_file))

    def begin(self, facts: dict[str, Any]) -> "RunFolder":
        """Note what the run begins with, or check that a resumed one goes on with the same.

        A former run is deleted here and not before: a misspelt model or too little text costs no student.

        Returns:
            the folder of the run that has begun.

        Raises:
            RunError: naming every difference; or the former run cannot be deleted.
        """
        self.check_same(facts)
        if self.replaces:
            self.processes.on_main(lambda: _delete_former(self))
        began = replace(self, replaces=False)
        if not began.facts():
            self.processes.on_main(lambda: write_json(self.facts_file, facts))
        return began

    def check_same(self, facts: dict[str, Any]) -> None:
        """Check what is known of a resumed run so far; all of it in `begin`.

        Raises:
            RunError: naming every difference.
        """
        began = self.facts()
        different = [
            _difference(name, began, facts)
            for name in SAME
            if began and name in facts and began.get(name) != facts[name]
        ]
        if different:
            raise RunError(
                "this run began with another " + " and another ".join(different),
                place=str(self.run),
                remedy="Repeat its own command with --resume (run.json holds it), or choose another --out.",
            )

    def check_weights(self, weights: str, origin: str) -> None:
        """Check that a resumed run goes on with the weights of its teacher that it began with.

        Args:
            weights: their fingerprint.
            origin: where they came from.

        Raises:
            RunError: they are others.
        """
        began = self.facts()
        noted = began.get("weights", weights)  # runs before this was noted: nobody knows
        if noted != weights:
            raise RunError(
                f"this run began with other weights of {began['model']}: {noted} ({began['teacher']['origin']}); "
                f"now they are {weights} ({origin})",
                place=str(self.run),
                remedy="Put back those that it began with, or choose another --out.",
            )

    def record(self, name: str, value: Any) -> None:
        """Add a result, or replace it."""
        known = self.results()
        self.processes.on_main(lambda: write_json(self.results_file, {**known, name: value}))

    def once(self, name: str, measure: Callable[[], Any], together: bool = False) -> Any:
        """The result of that name; measured now, by the main process, if no earlier part of the run did.

        A model that is sharded is measured by all processes `together`; what the main one finds counts.
        """
        known = self.results()
        if name in known:
            return known[name]
        self.record(name, measure() if together else self.processes.on_main(measure))
        return self.results()[name]


def _difference(name: str, began: dict[str, Any], facts: dict[str, Any]) -> str:
    """What changed under one name; of a recipe the values that did, for nobody can read a hash."""
    if name == "recipe_hash" and "settings" in began and "settings" in facts:
        was, now = _leaves(began["settings"]), _leaves(facts["settings"])
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        listed = [f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in keys[:MOST_NAMED]]
        more = f"; {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
        return f"recipe ({'; '.join(listed)}{more})"
    return f"{name} (was {began.get(name)!r}, is {facts[name]!r})"


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Plain data by dotted key."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for part, held in inner for name, leaf in _leaves(held, f"{key}.{part}".lstrip(".")).items()}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folder it lies in, whole or not at all.

    Raises:
        RunError: when it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folder it lies in, whole or not at all.

    Raises:
        RunError: when it cannot be written.
    """
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # without it, a power cut may leave the new name with an empty file
        os.replace(aside, path)
    except OSError as error:
        remedy = "Free space, or choose a folder that can be written."
        raise RunError(f"cannot be written: {error.strerror or error}", place=str(path), remedy=remedy) from None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _before_it_began(folder: RunFolder) -> tuple[Path, ...]:
    """What a run that was killed before its facts were written may have left."""
    return folder.run / ".lock", _aside(folder.facts_file)


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file; empty where there is none.

    Raises:
        RunError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read: {error}", place=str(path)) from None
    if not isinstance(found, dict):
        raise RunError(f"cannot be read: holds {type(found).__name__}, not keys and values", place=str(path))
    return found


@contextmanager
def share_run_folder(processes: Processes, out: str | Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """`open_run_folder` for many processes: the main one holds it, all of them must see it."""
    with ExitStack() as held:

        def take() -> bool:
            return held.enter_context(open_run_folder(out, resume=resume, overwrite=overwrite)).replaces

        replaces = processes.on_main(take)
        yield RunFolder(Path(out).absolute(), processes, replaces)


@contextmanager
def open_run_folder(out: str | Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Create the folder, or check that it may be used; hold it for this process alone until the block ends.

    Raises:
        RunError: another process runs in it; it holds files and neither `resume` nor `overwrite` is set; `overwrite`
            would delete something that is no run of ours; `resume` finds no run; or it cannot be written.
    """
    out = Path(out).absolute()
    folder = RunFolder(out)
    if resume and overwrite:
        raise RunError("--resume and --overwrite contradict each other", place=str(out))
    try:
        used = folder.student.is_file() or any(
            path.is_file() and path not in _before_it_began(folder) for path in out.rglob("*")
        )
        if resume and not folder.facts_file.is_file():
            raise RunError(
                "there is no run to go on with", place=str(out), remedy="Leave out --resume to start one there."
            )
        if used and not resume:
            known = folder.run / ".lock"
            with known.open("a") if known.is_file() else nullcontext() as held:
                if held is not None:
                    _take(held, folder)
                _refuse_former(folder, overwrite)
        folder.run.mkdir(parents=True, exist_ok=True)
        lock = (folder.run / ".lock").open("w")
    except OSError as error:
        remedy = "Choose another --out, or a disk and rights that allow it."
        raise RunError(f"cannot be written: {error.strerror or error}", place=str(out), remedy=remedy) from None
    with lock:
        _take(lock, folder)
        yield replace(folder, replaces=used and not resume)


def _take(lock: IO[str], folder: RunFolder) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError("another process is running in this folder", place=str(folder.student)) from None


def _refuse_former(folder: RunFolder, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a former run that may be overwritten."""
    ours = folder.student.is_dir() and folder.facts_file.is_file()
    if not overwrite:
        ways = "delete it with --overwrite, or go on with --resume." if ours else "or delete it yourself."
        remedy = f"Choose another --out, {ways}"
        raise RunError("exists already and is not empty", place=str(folder.student), remedy=remedy)
    if not ours:
        raise RunError(
            "holds something that no linearize run has written; --overwrite would delete it",
            place=str(folder.student),
            remedy="Choose another --out, or delete it yourself.",
        )


def _delete_former(folder: RunFolder) -> None:
    """Delete all but the lock, which is held; run.json last, for by it a run that may be deleted is known."""
    inside = [path for path in folder.run.iterdir() if path.name not in (".lock", folder.facts_file.name)]
    try:
        for path in [*(path for path in folder.student.iterdir() if path != folder.run), *inside]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.facts_file.unlink()
    except OSError as error:
        remedy = "Delete it yourself, or choose another --out."
        problem = f"cannot be deleted: {error.strerror or error}"
        raise RunError(problem, place=error.filename or str(folder.student), remedy=remedy) from None
