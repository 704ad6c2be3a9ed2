"""`linearize families`: the model families that can be converted."""

from __future__ import annotations

from linearize.commands.options import out_console


def list_families() -> None:
    """The model families that can be converted, and what is known of each."""
    from linearize.families import FAMILIES
    from linearize.tables import families_report

    out_console.print(families_report(FAMILIES.values()))
