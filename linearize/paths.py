"""Where shipped files lie, and where fetched ones go."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(kind: str) -> Path:
    """Find a folder that ships with linearize: `configs` or `recipes`.

    An installed wheel holds it inside the package, a checkout beside the package.

    Raises:
        FileNotFoundError: the installation has no such folder.
    """
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / kind).is_dir():
            return parent / kind
    raise FileNotFoundError(f"no folder '{kind}' in {_PACKAGE} or beside it; the installation is incomplete")


def cache_folder() -> Path:
    """Return the folder for fetched files: LINEARIZE_CACHE, else XDG_CACHE_HOME/linearize, else ~/.cache/linearize.

    It is not created here.
    """
    if chosen := os.environ.get("LINEARIZE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "linearize"
