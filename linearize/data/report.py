"""What `linearize data` prints, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linearize.data.cache import Entry, corpora_folder
from linearize.data.grams import RUN
from linearize.data.overlap import Overlap, Share


def overlap_report(found: Overlap) -> RenderableType:
    """Both sides' shares by source, and the documents that a threshold would drop."""
    held = _shares(f"Held-out text that stands in the training text, runs of {RUN} tokens", found.heldout)
    trained = _shares("Training text that stands in held-out text", found.training)
    dropped = ", ".join(f"{found.above(share):,} at {share:g}" for share in (0.0, 0.01, 0.1, 0.5))
    return Group(held, trained, f"--drop-overlap would drop of {found.documents.size:,} training documents: {dropped}.")


def cache_report(entries: Sequence[Entry]) -> RenderableType:
    """The cached corpora, the last used first."""
    if not entries:
        return f"No tokens are cached in {escape(str(corpora_folder()))}."
    table = _table("", "text", "tokens", "MB", "last used", "fingerprint")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        size = f"{entry.bytes / 1e6:,.1f}"
        table.add_row(escape(entry.name), f"{entry.tokens:,}", size, used, entry.folder.name[:12])
    total = sum(entry.bytes for entry in entries)
    return Group(table, f"{total / 1e6:,.1f} MB in {escape(str(corpora_folder()))}.")


def _shares(title: str, shares: Mapping[str, Share]) -> Table:
    table = _table(title, "source", "runs", "shared", "share")
    for name, share in shares.items():
        table.add_row(escape(name), f"{share.runs:,}", f"{share.seen:,}", f"{share.share:.3%}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
