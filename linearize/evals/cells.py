"""What was measured already: one small file a cell (a model, a task, a length), so that a repeated command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.errors import RunError
from linearize.evals.records import FOLDER, make_folder
from linearize.run_folder import write_json


class Cells:
    """The folder `OUT/evals/cells`. Delete it to measure everything again."""

    def __init__(self, out: Path) -> None:
        self.folder = make_folder(out, f"{FOLDER}/cells")

    def once(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The value (plain data) of that key, measured now if it was not before.

        Args:
            key: all that the value depends on, as plain data.
            measure: makes the value.
        """
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if not path.is_file():
            write_json(path, {"key": key, "value": measure()})
        try:
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"cannot be read: {error}", place=str(path), remedy="Delete this file.") from None
