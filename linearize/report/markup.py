"""HTML and SVG from Python, escaped by construction: text becomes markup only through `tag`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

VOID = frozenset({"meta", "br", "line", "rect", "circle", "path", "polyline"})
"""Elements that are written without children."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None
Attributes = Mapping[str, str | int | float | None]


def tag(name: str, attributes: Attributes | None = None, *children: Child) -> Markup:
    """An element; children that are not Markup are escaped, None is left out, attributes of None are left out.

    >>> tag("p", {"class": "note"}, "a < b")
    '<p class="note">a &lt; b</p>'
    """
    found = "".join(
        f' {key}="{escape(_number(value), quote=True)}"'
        for key, value in (attributes or {}).items()
        if value is not None
    )
    if not children and name in VOID:
        return Markup(f"<{name}{found}/>")
    return Markup(f"<{name}{found}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """One piece of markup from several."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


def _number(value: str | int | float) -> str:
    """Coordinates to a tenth of a unit: finer than any screen, and short."""
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
