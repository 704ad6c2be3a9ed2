"""`linearize push`: put a student on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.commands.options import log_console, out_console

PrivateOption = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Who may see it; default: private where the teacher is gated or may be.",
    ),
]
AcceptLicenseOption = Annotated[
    bool,
    typer.Option("--accept-license", help="Go on though the teacher's licence is unknown or may forbid it."),
]


def push(
    path: Annotated[Path, typer.Argument(help="The student's folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: PrivateOption = None,
    revision: Annotated[str | None, typer.Option(help="A branch of the student; made where there is none.")] = None,
    accept_license: AcceptLicenseOption = False,
    update: Annotated[bool, typer.Option("--update", help="Write into a repository that exists.")] = False,
) -> None:
    """Upload a student with its card, code, recipe and metrics. A push that broke off goes on when repeated."""
    from linearize.hub import Push
    from linearize.hub import push as run_push

    job = Push(path, repo, private, revision, accept_license, update)
    out_console.print(
        run_push(job, lambda text: log_console.print(text, highlight=False, markup=False)), highlight=False
    )


def check(repo: str) -> None:
    """Refuse a name or an account before hours of training, not after."""
    from linearize.hub import check_account

    check_account(repo)
