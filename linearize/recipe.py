"""Recipes: HOW to convert. A mixer, the layers that stay softmax, and a list of stages; no model names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from linearize.config import Config, Number, TokenCount, parse_count
from linearize.data import RecipeData, SourceConfig
from linearize.errors import RecipeError, unknown_name
from linearize.mixers import MIXERS, MixerConfig
from linearize.paths import shipped
from linearize.stages import STAGES, StageConfig
from linearize.surgery import KeepSoftmax

_KNOWN_KEYS = "; known keys: "

MIN_STEPS = 100
"""`--tokens` shrinks a stage's batch before it lets the stage fall below this many optimiser steps."""


class Recipe(Config):
    """One conversion method, read from a YAML file."""

    name: str
    paper: str = ""
    mixer: SerializeAsAny[MixerConfig]
    keep_softmax: KeepSoftmax = "none"
    replace_sliding: bool = Field(False, description="also replace layers whose softmax slides over a window already")
    stages: tuple[SerializeAsAny[StageConfig], ...] = Field(min_length=1)
    data: RecipeData = Field(
        "HuggingFaceFW/fineweb-edu:sample-10BT", description="without --data: a Hub data set, or a list of sources"
    )
    drop_overlap: Number | None = Field(
        None, ge=0, lt=1, description="drop training documents that share more than this with held-out text"
    )
    heldout_tokens: TokenCount = Field(8192, gt=1, description="tokens kept aside to measure on (per source of a file)")
    evaluations: int = Field(4, ge=1, description="held-out measurements per stage, the last at its end")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = Field(0, ge=0)

    @field_validator("keep_softmax", mode="wrap")
    @classmethod
    def _one_sentence(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """One message instead of one for each form the value could have had."""
        try:
            return validate(tuple(value) if isinstance(value, list) else value)
        except ValidationError:
            forms = "`none`, a list of layer numbers such as [0, 12], or {every: 4}"
            raise ValueError(f"must be {forms} (got {value!r})") from None

    @field_validator("data", mode="before")
    @classmethod
    def _data_is_text_or_list(cls, value: Any) -> Any:
        """One message instead of one for each form; `_check` has read a list's entries."""
        if value is None or (isinstance(value, (str, tuple)) and value):
            return value
        raise ValueError(f"must be a Hub data set, or a list of {{source: …, weight: …}} (got {value!r})")

    @model_validator(mode="after")
    def _stages_fit_the_mixer(self) -> "Recipe":
        """Findings name their key, so that the reader's message names its line."""
        mixer = MIXERS[self.mixer.kind].module
        findings = [
            InitErrorDetails(
                type=PydanticCustomError("value_error", "{rule}", {"rule": f"{rule} (mixer {self.mixer.kind})"}),
                loc=("stages", index, key),
                input=self.stages[index],
            )
            for index, stage in enumerate(self.stages)
            for key, rule in stage.misfits(mixer).items()
        ]
        if findings:
            raise ValidationError.from_exception_data("Recipe", findings)
        return self

    @model_validator(mode="after")
    def _transfer_sees_the_teacher(self) -> "Recipe":
        """Adapters change the layers that a transfer stage would ask as teacher, and are no part of what it trains."""
        adapted = [index for index, stage in enumerate(self.stages) if "lora" in stage.train]
        for index, stage in enumerate(self.stages):
            if stage.kind == "transfer" and adapted and adapted[0] < index and not self.needs_frozen_teacher:
                rule = f"learns from the teacher's layers, which stages.{adapted[0]} adapts by lora; put it before that"
                error = PydanticCustomError("value_error", "{rule}", {"rule": rule})
                found = InitErrorDetails(type=error, loc=("stages", index, "kind"), input=stage.kind)
                raise ValidationError.from_exception_data("Recipe", [found])
        return self

    @property
    def needs_frozen_teacher(self) -> bool:
        """Whether a stage trains base weights: the grafted model is then no longer its own teacher."""
        return any(stage.trains_base for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Training tokens over all stages."""
        return sum(stage.tokens for stage in self.stages)

    def digest(self) -> str:
        """A hash of every setting; equal recipes have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _Source(NamedTuple):
    """Where a value came from, for error messages."""

    name: str
    places: dict[str, str]  # of every key: a line of the file, or the --set that gave it

    def place(self, key: str) -> str:
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key] if key else self.name

    def override(self, key: str, place: str) -> None:
        for old in [old for old in self.places if f"{old}.".startswith(f"{key}.")]:
            del self.places[old]
        while key and key not in self.places:  # keys above it that no line of the file gives are its own, too
            self.places[key] = place
            key = key.rpartition(".")[0]


def recipe_names() -> list[str]:
    """The recipes that ship with linearize."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        RecipeError: when there is none; the known names are listed.
    """
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            raise RecipeError("no such recipe file", place=recipe, remedy="`linearize recipes list` shows what ships.")
        return path
    if recipe not in recipe_names():
        raise RecipeError(unknown_name("recipe", recipe, recipe_names()), place="--recipe")
    return shipped("recipes") / f"{recipe}.yaml"


def load_recipe(recipe: str, overrides: Sequence[str] = (), tokens: int | str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a shipped name or the path of a YAML file.
        overrides: `path=value` settings such as `stages.0.tokens=2M`; values are YAML.
        tokens: total training tokens; every stage's budget is scaled by the same factor.

    Raises:
        RecipeError: with file, line, key and the nearest known name.
    """
    path = find_recipe(recipe)
    values, lines = _read_yaml(path)
    source = _Source(str(path), {key: f"{path}, line {line}" for key, line in lines.items()})
    for override in overrides:
        source.override(_apply_override(values, override), f"--set {override}")
    checked = _check(values, source)
    return checked if tokens is None else _scale(checked, tokens)


def read_tokens(tokens: int | str) -> int:
    """A positive number of tokens from the command line, such as `150k`.

    Raises:
        RecipeError: it is none.
    """
    try:
        total = int(parse_count(tokens))
    except ValueError as error:
        raise RecipeError(str(error), place="--tokens") from None
    if total <= 0:
        raise RecipeError(f"{total} is not a positive number of tokens", place="--tokens")
    return total


def _scale(recipe: Recipe, tokens: int | str) -> Recipe:
    total = read_tokens(tokens)
    stages = tuple(_scale_stage(stage, stage.tokens * total // recipe.tokens) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _scale_stage(stage: StageConfig, tokens: int) -> StageConfig:
    """The stage with another budget; its batch shrinks, down to one row, while there are fewer than MIN_STEPS steps."""
    batch = min(stage.batch, max(1, tokens // (stage.length * MIN_STEPS)))
    micro_batch = next(size for size in range(min(stage.micro_batch, batch), 0, -1) if batch % size == 0)
    return stage.model_copy(update={"tokens": tokens, "batch": batch, "micro_batch": micro_batch})


def recipe_text(recipe: str) -> str:
    """A recipe's file as it was written.

    Raises:
        RecipeError: there is none, or it is no text.
    """
    return _read_text(find_recipe(recipe))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read as text: {error}", place=str(path)) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's values, and the line of every key."""
    text = _read_text(path)
    try:
        values, node = yaml.safe_load(text), yaml.compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        remedy = "YAML indents with spaces." if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"is not YAML: {error.problem}", place=place, remedy=remedy) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {' '.join(str(error).split())}", place=str(path)) from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise RecipeError(f"holds {found}, not keys and values", place=str(path))
    lines: dict[str, int] = {}
    try:
        _collect_lines(node, "", lines)
    except KeyError as error:
        key, line = error.args
        raise RecipeError(f"{key}: is given twice", place=f"{path}, line {line}") from None
    except RecursionError:
        raise RecipeError("holds an alias of itself", place=str(path)) from None
    return values, lines


def _collect_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    """Note the line of every key. Raises KeyError(key, line) for one given twice: YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}".lstrip(".")
            if name in lines:
                raise KeyError(name, key.start_mark.line + 1)
            lines[name] = key.start_mark.line + 1
            _collect_lines(value, name, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = f"{prefix}.{index}".lstrip(".")
            lines[name] = value.start_mark.line + 1
            _collect_lines(value, name, lines)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set `stages.0.tokens=2M` in plain data and return its key; the check afterwards refuses unknown keys."""
    place = f"--set {override}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError("is not of the form key.key=value.", place=place, remedy="Example: stages.0.tokens=2M")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value is not YAML: {' '.join(str(error).split())}", place=place) from None
    target: Any = values
    for depth, key in enumerate(keys):
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                raise RecipeError(f"'{key}' is not one of the items 0 to {len(target) - 1}", place=place)
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
        else:
            raise RecipeError(f"'{'.'.join(keys[:depth])}' holds a plain value, not keys", place=place)
        if depth == len(keys) - 1:
            target[index] = value
        elif isinstance(target, dict):
            if target.get(index) is None:
                target[index] = {}
            target = target[index]
        else:
            target = target[index]
    return ".".join(keys)


def _check(values: dict[str, Any], source: _Source) -> Recipe:
    """Validate the parts against the tables, then the whole."""
    rest = {key: value for key, value in values.items() if key not in {"mixer", "stages"}}
    if "mixer" in values:
        rest["mixer"] = _part(values["mixer"], "mixer", {kind: entry.config for kind, entry in MIXERS.items()}, source)
    if "stages" in values:
        if not isinstance(values["stages"], list):
            raise RecipeError("stages must be a list", place=source.place("stages"))
        kinds = {kind: entry.config for kind, entry in STAGES.items()}
        rest["stages"] = tuple(
            _part(stage, f"stages.{index}", kinds, source) for index, stage in enumerate(values["stages"])
        )
    if isinstance(values.get("data"), list):
        rest["data"] = tuple(
            _validate(SourceConfig, entry, f"data.{index}", source) for index, entry in enumerate(values["data"])
        )
    return _validate(Recipe, rest, "", source)


def _part(values: Any, key: str, table: Mapping[str, type[Config]], source: _Source) -> Config:
    """A mixer or a stage: `kind` picks its configuration class from the table."""
    known = ", ".join(sorted(table))
    if not isinstance(values, dict) or "kind" not in values:
        raise RecipeError(f"{key} needs a `kind`, one of: {known}", place=source.place(key))
    kind = str(values["kind"])
    if kind not in table:
        raise RecipeError(f"{key}.kind: {unknown_name('kind', kind, table)}", place=source.place(f"{key}.kind"))
    return _validate(table[kind], values, key, source)


def _validate(model: type[Any], values: dict[str, Any], prefix: str, source: _Source) -> Any:
    """Validate, and turn pydantic's findings into one error that names every place."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        findings = []
        for item in error.errors():
            inside = [str(part) for part in item["loc"] if part != "[key]"]  # pydantic's mark of a wrong dictionary key
            key = ".".join([*([prefix] if prefix else []), *inside])
            findings.append((key, _explain(item, model)))
        text = "; ".join(f"{key}: {message}" if key else message for key, message in _said_once(findings))
        places = [source.place(key) for key, _ in findings]
        raise RecipeError(text, place=next((place for place in places if place != source.name), source.name)) from None


def _said_once(findings: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Known keys are listed with the first unknown one: a file of something else has many."""
    listed: set[str] = set()
    for key, message in findings:
        start, mark, names = message.partition(_KNOWN_KEYS)
        yield key, start if names in listed else message
        listed |= {names} if mark else set()


def _explain(item: Any, model: type[Config]) -> str:
    if item["type"] == "extra_forbidden":
        names = _field_names(model, item["loc"][:-1])
        near = get_close_matches(str(item["loc"][-1]), names, n=1)
        return "unknown key" + (f"; did you mean '{near[0]}'?" if near else f"{_KNOWN_KEYS}{', '.join(sorted(names))}")
    if item["type"] == "missing":
        return "is missing"
    if item["type"] == "model_type":
        return f"must hold keys and values (got {item['input']!r})"
    if item["type"] == "literal_error":
        near = get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]), n=1)
        return f"{item['msg']} (got {item['input']!r})" + (f"; did you mean '{near[0]}'?" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    return message if item["type"] == "value_error" else f"{message} (got {item['input']!r})"


def _field_names(model: type[Config], path: Sequence[Any]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    for part in path:
        field = model.model_fields.get(str(part))
        candidates = [field.annotation, *get_args(field.annotation)] if field is not None else []
        nested = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Config)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
