"""The recipes that ship: all load, are found by name, and refuse options that contradict them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from linearize.errors import RecipeError
from linearize.recipe import find_recipe, load_recipe, recipe_names
from tests.test_recipe import failure


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.paper
    written = tmp_path / "recipe.yaml"  # what an exported student carries
    written.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe(str(written)) == recipe
    assert load_recipe(str(written)).digest() == recipe.digest()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("hedgehod", "--recipe: unknown recipe 'hedgehod'; did you mean 'hedgehog'? Known: "),
        ("zzz", "--recipe: unknown recipe 'zzz'. Known: "),
        ("", "--recipe: unknown recipe ''"),
        ("nowhere.yaml", "nowhere.yaml: no such recipe file. `linearize recipes list`"),
        ("nowhere/hedgehog", "nowhere/hedgehog: no such recipe file"),
    ],
)
def test_recipes_that_are_not_there(recipe: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(recipe)
    assert str(caught.value).startswith(said)


CONTRADICTIONS = [  # (recipe, override, key, rule)
    ("lizard", "mixer.window=0", "mixer.window", "greater than or equal to 1"),
    ("swa-sink", "mixer.window=0", "mixer.window", "greater than or equal to 1"),
    ("lolcats", "mixer.window=-1", "mixer.window", "greater than or equal to 1"),
    ("lawcat", "mixer.kernel=0", "mixer.kernel", "greater than or equal to 1"),
    ("mamba2-mimic", "mixer.conv=0", "mixer.conv", "greater than or equal to 2"),
    ("gdn", "mixer.conv=1", "mixer.conv", "sees no earlier token; use 0 for none"),
    ("hedgehog", "mixer.features=513", "mixer.features", "less than or equal to 512"),
    ("lizard-published", "mixer.sinks=4", "mixer", "published has no sinks"),
    ("lizard", "mixer.half_life=[512, 16]", "mixer", "the smaller one first"),
    ("mamba-in-llama", "mixer.start=mimic", "mixer", "has a random start only"),
    ("mohawk", "mixer.half_life=[1, 2]", "mixer", "has a fixed structure"),
    ("gdn", "stages.0.objective={attention_ce: 1.0}", "stages.0.objective", "rows of attention weights"),
    ("lawcat", "stages.0.objective={attention_ce: 1.0}", "stages.0.objective", "rows of attention weights"),
    ("liger", "stages.0.train=[all, lora]", "stages.0.train", "all"),
]


@pytest.mark.parametrize(("recipe", "override", "key", "rule"), CONTRADICTIONS)
def test_contradicting_options_are_refused_with_the_rule(recipe: str, override: str, key: str, rule: str) -> None:
    said = failure(find_recipe(recipe), override)
    assert key in said
    assert rule in said
