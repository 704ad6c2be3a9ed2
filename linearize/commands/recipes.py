"""`linearize recipes`: list, show and check recipes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from linearize.commands.options import SetOption, TokensOption, log_console, out_console

app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")


@app.command("list")
def list_recipes() -> None:
    """The recipes that ship with linearize."""
    from linearize.recipe import load_recipe, recipe_names
    from linearize.tables import recipes_report

    out_console.print(recipes_report([load_recipe(name) for name in recipe_names()]))


@app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")]) -> None:
    """Print a recipe's file: copy it to begin your own."""
    from linearize.recipe import recipe_text

    sys.stdout.write(recipe_text(name))


@app.command("validate")
def validate_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    tokens: TokensOption = None,
    overrides: SetOption = None,
) -> None:
    """Check a recipe and print every value it would run with."""
    import yaml

    from linearize.recipe import load_recipe

    recipe = load_recipe(name, overrides or (), tokens)
    sys.stdout.write(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    log_console.print(f"{name}: valid.", highlight=False)
