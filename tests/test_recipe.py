"""Recipes: whatever is wrong is said with file, line, key and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from linearize.adapters import LoraSettings
from linearize.config import parse_count
from linearize.errors import RecipeError
from linearize.mixers.hedgehog import Hedgehog, HedgehogConfig
from linearize.recipe import MIN_STEPS, Recipe, load_recipe
from linearize.stages.distil import DistilConfig
from linearize.stages.parts import PARTS, Part
from linearize.stages.transfer import OBJECTIVES, ObjectiveName, TransferConfig
from linearize.surgery import EveryNth

GOOD = """\
name: test
mixer:
  kind: hedgehog
  bias: true
keep_softmax: [0, 2]
stages:
  - kind: transfer
    tokens: 8M
    optimizer:
      lr: 0.01
  - kind: distil
    tokens: 4M
    batch: 6
    micro_batch: 3
"""
"""Lines: 1 name, 2-4 mixer, 5 keep_softmax, 6 stages, 7-10 transfer, 11-14 distil."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def failure(file: Path, *overrides: str, tokens: int | str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), overrides, tokens)
    text = str(caught.value)
    assert "pydantic" not in text
    assert "\n" not in text
    return text


def test_a_good_recipe_is_read_as_written(file: Path) -> None:
    recipe = load_recipe(str(file))
    assert recipe.name == "test"
    assert recipe.mixer == HedgehogConfig(bias=True)
    assert recipe.keep_softmax == (0, 2)
    transfer, distil = recipe.stages
    assert isinstance(transfer, TransferConfig)
    assert isinstance(distil, DistilConfig)
    assert (transfer.tokens, transfer.optimizer.lr) == (8_000_000, 0.01)
    assert (distil.tokens, distil.batch, distil.micro_batch) == (4_000_000, 6, 3)
    assert recipe.tokens == 12_000_000


BROKEN = [  # (what is replaced, by what, line, what is said)
    ("name: test\n", "", None, "name: is missing"),
    ("name: test", "name: [1]", 1, "name: Input should be a valid string (got [1])"),
    ("name: test", "nam: test", 1, "nam: unknown key; did you mean 'name'?"),
    ("name: test", "name: test\nzzz: 1", 2, "zzz: unknown key; known keys: data, drop_overlap, evaluations"),
    ("name: test", "name: test\nname: again", 2, "name: is given twice"),
    ("name: test", "name: test\n1: 2", 2, "1: Keys should be strings"),
    ("name: test", "name: test\nprecision: bf61", 2, "precision: .* (got 'bf61'); did you mean 'bf16'?"),
    ("name: test", "name: test\nheldout_tokens: 1e999", 2, "heldout_tokens: '1e999' is too large"),
    ("name: test", "name: test\nevaluations: 0", 2, "evaluations: Input should be greater than or equal to 1 (got 0)"),
    ("name: test", "name: test\nseed: x", 2, "seed: Input should be a valid integer"),
    ("kind: hedgehog", "kind: hedgehoc", 3, "mixer.kind: unknown kind 'hedgehoc'; did you mean 'hedgehog'?"),
    ("kind: hedgehog", "kind: [hedgehog]", 3, "mixer.kind: unknown kind"),
    ("kind: hedgehog", "knd: hedgehog", 2, "mixer needs a `kind`, one of: .*hedgehog"),
    ("bias: true", "biass: true", 4, "mixer.biass: unknown key; did you mean 'bias'?"),
    ("bias: true", "normalisation: sofmax", 4, "mixer.normalisation: .* (got 'sofmax'); did you mean 'softmax'?"),
    ("bias: true", "features: 0", 4, "mixer.features: Input should be greater than or equal to 1"),
    ("kind: transfer", "kind: tranfer", 7, "stages.0.kind: unknown kind 'tranfer'; did you mean 'transfer'?"),
    ("kind: transfer", "objective: {mse: 1}", 7, "stages.0 needs a `kind`, one of: .*distil, .*transfer"),
    ("tokens: 8M", "", 7, "stages.0.tokens: is missing"),
    ("tokens: 8M", "tokens: 8X", 8, "stages.0.tokens: '8X' is not a token count; write 150000, 150k, 2M or 1B"),
    ("tokens: 8M", "tokens: -8", 8, "stages.0.tokens: Input should be greater than 0 (got -8)"),
    ("tokens: 8M", "tokens: yes", 8, "stages.0.tokens: 'True' is not a token count"),
    ("tokens: 8M", "tokens: 8M\n    length: 1", 9, "stages.0.length: Input should be greater than or equal to 2"),
    ("tokens: 8M", "tokens: 8M\n    objective: {mss: 1}", 9, "stages.0.objective.mss: .*; did you mean 'mse'?"),
    ("tokens: 8M", "tokens: 8M\n    objective: {mse: 0}", 9, "stages.0.objective: needs at least one positive weight"),
    ("tokens: 8M", "tokens: 8M\n    objective: {mse: -1, relative_mse: 1}", 9, "no negative one"),
    ("lr: 0.01", "lr: 1e-2", 10, "stages.0.optimizer.lr: YAML reads '1e-2' as text, .*; write 0.01 or 1.0e-02"),
    ("lr: 0.01", "lr: .inf", 10, "stages.0.optimizer.lr: Input should be a finite number (got inf)"),
    ("lr: 0.01", "lr: .nan", 10, "stages.0.optimizer.lr: "),
    ("lr: 0.01", "lr: nan", 10, "stages.0.optimizer.lr: "),
    ("lr: 0.01", "lr: yes", 10, "stages.0.optimizer.lr: must be a number (got True)"),
    ("lr: 0.01", "lrr: 1", 10, "stages.0.optimizer.lrr: unknown key; did you mean 'lr'?"),
    ("lr: 0.01", "schedule: cosin", 10, "stages.0.optimizer.schedule: .*; did you mean 'cosine'?"),
    ("lr: 0.01", "betas: [0.9]", 10, "stages.0.optimizer.betas.1: is missing"),
    ("lr: 0.01", "betas: [0.9, 1.5]", 10, "stages.0.optimizer.betas.1: Input should be less than 1"),
    ("\n      lr: 0.01", " 5", 9, "stages.0.optimizer: must hold keys and values (got 5)"),
    ("batch: 6", "batch: 7", 11, "stages.1: micro_batch 3 does not divide batch 7"),
    ("batch: 6", "batch: 6\n    kl: 0", 11, "stages.1: kl and ce are both 0: there is nothing to learn from"),
    ("batch: 6", "batch: 6\n    lora: null", 11, "stages.1: train names lora, but lora is null"),
    ("batch: 6", "batch: 6\n    train: [mixer]\n    lora: {}", 11, "lora has settings, but train does not name lora"),
    ("batch: 6", "batch: 6\n    train: []", 14, "stages.1.train: is empty: there is nothing to train"),
    ("batch: 6", "batch: 6\n    train: [qkv, o, qkv]", 14, "stages.1.train: names qkv more than once"),
    ("batch: 6", "batch: 6\n    train: [all, mixer]", 14, "`all` is every parameter, .*(got mixer too)"),
    ("batch: 6", "batch: 6\n    train: [mixers]", 14, "stages.1.train.0: .*(got 'mixers'); did you mean 'mixer'?"),
    (
        "tokens: 8M",
        "tokens: 8M\n    train: [mixer, norms]",
        9,
        "stages.0.train: .*cannot train norms; it trains mixer, qkv",
    ),
    ("tokens: 8M", "tokens: 8M\n    train: [all]", 9, "stages.0.train: .*cannot train all"),
    ("tokens: 8M", "tokens: 8M\n    train: [lora]", 9, "stages.0.train: .*cannot train lora"),
    ("tokens: 8M", "tokens: 8M\n    train: [o]", 7, "stages.0: train names o, but only the objective `hidden` sees"),
    ("tokens: 8M", "tokens: 8M\n    train: [o]\n    objective: {hidden: 0, mse: 1}", 7, "only the objective `hidden`"),
    ("tokens: 8M", "tokens: 8M\n    length: true", 9, "stages.0.length: must be a whole number (got True)"),
    ("bias: true", "features: yes", 4, "mixer.features: must be a whole number (got True)"),
    ("name: test", "name: test\nseed: false", 2, "seed: must be a whole number (got False)"),
    ("batch: 6", "batch: 6\n    lora: {r: true}", 14, "stages.1.lora.r: must be a whole number (got True)"),
    ("batch: 6", "batch: 6\n    lora: {rank: 4}", 14, "stages.1.lora.rank: unknown key; known keys: alpha, dropout, r"),
    ("batch: 6", "batch: 6\n    temperature: 0", 14, "stages.1.temperature: Input should be greater than 0"),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), BROKEN)
def test_what_is_wrong_is_said_where(file: Path, old: str, new: str, line: int | None, said: str) -> None:
    assert GOOD.count(old) >= 1
    file.write_text(GOOD.replace(old, new, 1))
    text = failure(file)
    assert text.startswith(f"{file}, line {line}: " if line else f"{file}: ")
    position = 0
    for piece in said.split(".*"):  # in this order
        assert piece in text[position:], text
        position = text.index(piece, position) + len(piece)


@pytest.mark.parametrize(
    "value",
    ["nine", "[0, x]", "{evry: 2}", "{every: x}", "3", "null", "[[0]]", "{}", "[true]", "true", "{every: true}"],
)
def test_keep_softmax_errors_are_one_sentence(file: Path, value: str) -> None:
    file.write_text(GOOD.replace("[0, 2]", value))
    forms = "must be `none`, a list of layer numbers such as [0, 12], or {every: 4}"
    assert failure(file) == f"{file}, line 5: keep_softmax: {forms} (got {yaml.safe_load(value)!r})"


@pytest.mark.parametrize(
    ("value", "read"), [("none", "none"), ("[]", ()), ("[5]", (5,)), ("{every: 4}", EveryNth(every=4))]
)
def test_keep_softmax_forms(file: Path, value: str, read: object) -> None:
    file.write_text(GOOD.replace("[0, 2]", value))
    assert load_recipe(str(file)).keep_softmax == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing, not keys and values"),
        ("- a", "holds list, not keys and values"),
        ("just words", "holds str, not keys and values"),
        ("a: [", "is not YAML"),
        ("a:\tb\n\tc", "line 1: is not YAML: found character '\\t' that cannot start any token. YAML indents with"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
        ("a: &a [*a]", "holds an alias of itself"),
        ("name: t\nmixer: hedgehog\nstages: []", "line 2: mixer needs a `kind`"),
        ("name: t\nmixer: {kind: hedgehog}\nstages: []", "line 3: stages: Tuple should have at least 1 item"),
        ("name: t\nmixer: {kind: hedgehog}\nstages: 5", "line 3: stages must be a list"),
        ("name: t\nmixer: {kind: hedgehog}\nstages: [5]", "line 3: stages.0 needs a `kind`"),
        ("name: t\n", "mixer: is missing; stages: is missing"),
    ],
)
def test_files_that_are_no_recipes(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    found = failure(file)
    assert found.startswith(str(file))
    assert said in found


def test_all_mistakes_are_listed_at_once(file: Path) -> None:
    file.write_text(GOOD.replace("lr: 0.01", "lr: -1\n      warmup: 2\n      decoy: 1"))
    text = failure(file)
    for key in ("optimizer.lr", "optimizer.warmup", "optimizer.decoy: unknown key; did you mean 'decay'?"):
        assert f"stages.0.{key}" in text


def test_bytes_that_are_no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00name")
    assert "cannot be read as text" in failure(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.tokens", "is not of the form key.key=value"),
        ("=3", "is not of the form"),
        ("stages..tokens=3", "is not of the form"),
        ("stages.2.tokens=3", "'2' is not one of the items 0 to 1"),
        ("stages.-1.tokens=3", "'-1' is not one of the items 0 to 1"),
        ("stages.x=3", "'x' is not one of the items"),
        ("stages.0.tokens.x=3", "'stages.0.tokens' holds a plain value, not keys"),
        ("stages.0.optimizer.lr=[1", "the value is not YAML"),
        ("stages.0.optimizer.lr=1e-3", "stages.0.optimizer.lr: YAML reads '1e-3' as text"),
        ("stages.0.tokenz=3", "stages.0.tokenz: unknown key; did you mean 'tokens'?"),
        ("stages.1.lora.rank=3", "stages.1.lora.rank: unknown key"),
        ("stage.0.tokens=3", "stage: unknown key; did you mean 'stages'?"),
        ("mixer.kind=softmax", "mixer.kind: unknown kind 'softmax'"),
        ("stages=5", "stages must be a list"),
        ("stages.0={kind: distil, tokns: 5}", "stages.0.tokens: is missing; stages.0.tokns: unknown key"),
        ("name=", "name: Input should be a valid string (got None)"),
        ("keep_softmax=x", "keep_softmax: must be `none`, a list"),
    ],
)
def test_overrides_that_cannot_be_used_are_named_themselves(file: Path, override: str, said: str) -> None:
    text = failure(file, override)
    assert text.startswith(f"--set {override}: ")
    assert said in text


def test_a_mistake_in_the_file_is_not_put_on_an_override(file: Path) -> None:
    file.write_text(GOOD.replace("lr: 0.01", "lrr: 0.01"))
    assert failure(file, "stages.0.tokens=2M").startswith(f"{file}, line 10: stages.0.optimizer.lrr")


def test_overrides_are_yaml_and_the_last_one_holds(file: Path) -> None:
    changes = ["stages.0.tokens=2M", "stages.0.tokens=3k", "stages.1.lora.r=4", "mixer.bias=false", "data=null"]
    changes += ["keep_softmax={every: 2}", "stages.0.objective={attention_ce: 1.0}", "stages.0.optimizer.clip=null"]
    recipe = load_recipe(str(file), changes)
    transfer, distil = recipe.stages
    assert isinstance(transfer, TransferConfig)
    assert isinstance(distil, DistilConfig)
    assert transfer.tokens == 3000
    assert transfer.objective == {"attention_ce": 1.0}
    assert transfer.optimizer.clip is None
    assert transfer.optimizer.lr == 0.01
    assert distil.lora is not None
    assert (distil.lora.r, distil.lora.alpha) == (4, 16)
    assert recipe.mixer == HedgehogConfig()
    assert recipe.keep_softmax == EveryNth(every=2)
    assert recipe.data is None


@pytest.mark.parametrize(
    ("tokens", "total"), [("24M", 24_000_000), (1_200_000, 1_200_000), ("9k", 9_000), ("1e6", 10**6)]
)
def test_tokens_scale_every_stage(file: Path, tokens: int | str, total: int) -> None:
    plain, recipe = load_recipe(str(file)), load_recipe(str(file), tokens=tokens)
    assert total - len(recipe.stages) < recipe.tokens <= total
    for before, after in zip(plain.stages, recipe.stages, strict=True):
        assert after.tokens == before.tokens * total // 12_000_000
        assert after.batch <= before.batch
        assert after.batch % after.micro_batch == 0
        if after.batch > 1:  # it was not shrunk further than needed
            assert after.steps >= MIN_STEPS
        assert after.optimizer == before.optimizer


@pytest.mark.parametrize("tokens", ["0", 0, -3, "-3", "x", "1e999", "0.4", ""])
def test_tokens_that_cannot_be_used(file: Path, tokens: int | str) -> None:
    assert failure(file, tokens=tokens).startswith("--tokens: ")


@pytest.mark.parametrize(
    ("text", "count"),
    [("150k", 150_000), ("2M", 2 * 10**6), ("0.5B", 5 * 10**8), (" 7 ", 7), ("1_000", 1000), (".5m", 500_000), (9, 9)],
)
def test_token_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


CHANGES = [
    "name=other",
    "drop_overlap=0.1",
    "paper=x",
    "mixer.bias=false",
    "mixer.features=8",
    "keep_softmax=none",
    "replace_sliding=true",
    "stages.0.tokens=9M",
    "stages.0.length=512",
    "stages.0.objective={relative_mse: 2.0}",
    "stages.0.optimizer.lr=0.02",
    "stages.0.optimizer.clip=null",
    "stages.1.kl=0.5",
    "stages.1.lora.r=4",
    "stages.1.train=[norms, lora]",
    "stages.1.micro_batch=2",
    "data=null",
    "heldout_tokens=9",
    "evaluations=3",
    "precision=fp32",
    "seed=1",
]


@pytest.mark.parametrize(
    ("rows", "objective", "said"),
    [
        (
            "matrix",
            "attention_ce",
            "attention_ce compares rows of attention weights that sum to 1; this mixer has none. ",
        ),
        ("none", "attention_ce", "It can have: mse, relative_mse, hidden (mixer hedgehog)"),
        ("none", "matrix", "matrix compares the matrices that values are mixed with; this mixer has none. "),
    ],
)
def test_an_objective_that_the_mixer_does_not_have(
    file: Path, monkeypatch: pytest.MonkeyPatch, rows: str, objective: str, said: str
) -> None:
    file.write_text(GOOD.replace("tokens: 8M", f"tokens: 8M\n    objective: {{mse: 1, {objective}: 0.5}}"))
    assert load_recipe(str(file))
    monkeypatch.setattr(Hedgehog, "rows", rows)
    text = failure(file)
    assert text.startswith(f"{file}, line 9: stages.0.objective: ")
    assert said in text
    file.write_text(GOOD.replace("tokens: 8M", f"tokens: 8M\n    objective: {{mse: 1, {objective}: 0}}"))
    assert load_recipe(str(file))  # a weight of 0 asks for nothing


def test_transfer_after_adapters_is_refused(file: Path) -> None:
    """Those in MLPs and in layers that stay softmax would be part of its teacher."""
    transfer = "  - kind: transfer\n    tokens: 1M\n"
    text = GOOD.rstrip() + "\n" + transfer
    file.write_text(text)
    assert "stages.2.kind: learns from the teacher's layers, which stages.1 adapts by lora" in failure(file)
    file.write_text(text + "    train: [mixer, qkv]\n")
    assert load_recipe(str(file)).needs_frozen_teacher  # a copy that has no adapters


@pytest.mark.parametrize(
    ("train", "lora", "frozen_teacher"),
    [
        (None, LoraSettings(), False),
        ("[lora]", LoraSettings(), False),
        ("[mixer]", None, False),
        ("[norms, lora]", LoraSettings(), True),
        ("[qkv]", None, True),
        ("[all]", None, True),
    ],
)
def test_what_a_stage_trains(file: Path, train: str | None, lora: LoraSettings | None, frozen_teacher: bool) -> None:
    recipe = load_recipe(str(file), [] if train is None else [f"stages.1.train={train}"])
    stage = recipe.stages[1]
    assert isinstance(stage, DistilConfig)
    assert stage.lora == lora
    assert recipe.needs_frozen_teacher == stage.trains_base == frozen_teacher


def test_every_objective_and_part_is_listed_once() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName))
    assert set(PARTS) == set(get_args(Part))


def test_the_digest_is_stable_and_sees_every_setting(file: Path) -> None:
    digest = load_recipe(str(file)).digest()
    file.write_text(GOOD.replace("8M", "8000000").replace("[0, 2]", "[0,  2] # same"))
    assert load_recipe(str(file)).digest() == digest
    found = {load_recipe(str(file), [change]).digest() for change in CHANGES}
    assert len(found) == len(CHANGES)
    assert digest not in found
    assert {change.split("=")[0].split(".")[0] for change in CHANGES} == set(Recipe.model_fields)


def test_a_recipe_cannot_be_changed(file: Path) -> None:
    recipe = load_recipe(str(file))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
