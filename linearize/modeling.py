"""Config and model classes of students: one factory makes `Linearized<Family>` for every family.

Registered with the Auto* classes when linearize is imported, so that
`AutoModelForCausalLM.from_pretrained(folder)` builds the student that `config.linearize` describes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from linearize.errors import SurgeryError
from linearize.families import FAMILIES, ModelFamily
from linearize.families.shapes import window_of
from linearize.mixers import MixerConfig, StudentMixer, mixer_config
from linearize.surgery import STUDENT_PREFIX, graft, plan_surgery

STUDENT_LAYER_TYPE = "hybrid"
"""The `layer_types` entry of student layers. transformers accepts fixed names only; with `linear_attention` in every
layer its default cache cannot tell its length before the first token (cache.py replaces such layers anyway)."""

FORMAT = 1
"""Of the `linearize` entry in config.json."""


def surgery_entry(mixer: MixerConfig, layers: tuple[int, ...]) -> dict[str, Any]:
    """What config.json says under `linearize`: enough to repeat the surgery."""
    return {"format": FORMAT, "mixer": mixer.model_dump(mode="json"), "layers": list(layers)}


def student_config(teacher: PretrainedConfig, mixer: MixerConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """The configuration of a student: the teacher's fields, `layer_types`, and the `linearize` entry."""
    values = teacher.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "quantization_config", "auto_map"):
        values.pop(key, None)
    values["layer_types"] = _layer_types(teacher, layers)
    values["linearize"] = surgery_entry(mixer, layers)
    config_class = STUDENT_CLASSES[teacher.model_type][0]
    config = config_class(**values)
    config.architectures = [STUDENT_CLASSES[teacher.model_type][1].__name__]
    return config


def _layer_types(teacher: PretrainedConfig, layers: tuple[int, ...]) -> list[str]:
    """Of a student whose `layers` are replaced. Where the trunk picks masks or RoPE by them, they stay as they are."""
    family = FAMILIES[teacher.model_type]
    if family.reads_layer_types:
        return list(teacher.layer_types)
    kept = [
        "full_attention" if window_of(family, teacher, index) is None else "sliding_attention"
        for index in range(teacher.num_hidden_layers)
    ]
    return [STUDENT_LAYER_TYPE if index in layers else kind for index, kind in enumerate(kept)]


def _perform_surgery(model: PreTrainedModel, family: ModelFamily) -> None:
    """Graft the mixers that `model.config.linearize` describes; used while a student is being built."""
    entry = model.config.linearize
    if entry is None:
        raise SurgeryError(
            "there is no `linearize` entry, so nothing says which layers are students",
            place="config.json",
            remedy=f"Load it as an ordinary {family.causal_lm}, or convert it with `linearize convert`.",
        )
    if entry["format"] != FORMAT:
        raise SurgeryError(
            f"the `linearize` entry has format {entry['format']}, not {FORMAT}: a newer linearize wrote it",
            place="config.json",
            remedy="Update linearize.",
        )
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    if wrong := sorted(set(entry["layers"]) - set(range(len(layers)))):
        raise SurgeryError(
            f"layers {wrong} do not exist; the model has layers 0 to {len(layers) - 1}",
            place="config.json, linearize.layers",
        )
    kept = tuple(index for index in range(len(layers)) if index not in entry["layers"])
    grafted = graft(model, plan_surgery(model, mixer_config(entry["mixer"]), kept, replace_sliding=True))
    for student in grafted.students.values():
        _prepare_for_offloading(student.mixer)


def _prepare_for_offloading(mixer: nn.Module) -> None:
    """Accelerate may keep weights elsewhere (CPU, disk) and bring a module's when it is called; mixers read those of
    their parts directly: they have to come with the mixer's own call."""
    parts = tuple(mixer.modules())
    mixer.register_forward_pre_hook(partial(_fetch_parts, parts))  # partial: a model is copied and sent with its hooks
    mixer.register_forward_hook(partial(_leave_parts, parts))


def _fetch_parts(parts: tuple[nn.Module, ...], _mixer: nn.Module, _heads: Any) -> None:
    for part in parts:
        if "_hf_hook" in vars(part) and any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            part._hf_hook.pre_forward(part)  # type: ignore[operator, union-attr]


def _leave_parts(parts: tuple[nn.Module, ...], _mixer: nn.Module, _heads: Any, _mixed: Any) -> None:
    for part in parts:
        if "_hf_hook" in vars(part):
            part._hf_hook.post_forward(part, None)  # type: ignore[operator, union-attr]


def _make_classes(family: ModelFamily) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Subclasses of the family's own config and language model."""
    base_config: type[PretrainedConfig] = _lazy(family.config_class)
    base_model: type[PreTrainedModel] = _lazy(family.causal_lm)
    stem = family.causal_lm.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    model_type = STUDENT_PREFIX + family.model_type

    config_class = type(
        f"Linearized{stem}Config",
        (base_config,),
        {
            "__module__": __name__,
            "__doc__": f"{stem} with student layers; `linearize` describes the surgery.",
            "__annotations__": {"linearize": "dict | None", "layer_types": "list | None"},
            "model_type": model_type,
            "linearize": None,
            "layer_types": None,
        },
    )

    class Linearized(base_model):  # type: ignore[misc, valid-type]
        _is_stateful = True  # it cannot go back: no assisted generation
        _keep_in_fp32_modules_strict = ["mixer"]
        _keep_in_fp32_modules = [r".*\.mixer"]  # what quantisers leave alone: they match from the start of a name

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            _perform_surgery(self, family)

        def initialize_weights(self) -> None:
            """For weights that a checkpoint lacks: `_init_weights` of a head model is not asked about its decoder's
            modules, so that mixers would keep whatever lay in memory."""
            super().initialize_weights()
            for module in self.modules():
                if isinstance(module, StudentMixer):
                    _start_missing(module)

        def init_continuous_batching(self, *_arguments: Any, **_named: Any) -> NoReturn:
            """Refused here: transformers would log the mixers' errors and return empty answers (docs/serving.md)."""
            raise RuntimeError(
                "a linear-attention student cannot run under continuous batching, which has no place for a state per "
                "request; use generate() with left-padded batches"
            )

    if family.soft_cap is not None:  # sdpa has no cap, which transformers before 5.23 did not say; then remove
        Linearized._supports_sdpa = False
    Linearized.config_class = config_class
    Linearized.__name__ = Linearized.__qualname__ = f"Linearized{stem}ForCausalLM"
    Linearized.__doc__ = f"{family.causal_lm} whose layers listed in `config.linearize` are linear-attention students."
    return config_class, Linearized


@torch.no_grad()
def _start_missing(mixer: StudentMixer) -> None:
    """Give a mixer its initial values, except where transformers has marked a parameter as loaded."""
    loaded = [(p, p.clone()) for p in mixer.parameters() if getattr(p, "_is_hf_initialized", False)]
    mixer.reset_parameters()
    for parameter, value in loaded:
        parameter.copy_(value)


def _lazy(name: str) -> Any:
    """A class of transformers by name; its top-level module imports them on access."""
    return getattr(transformers, name)


def _saving_code(save: Callable[..., None]) -> Callable[..., None]:
    """`save_pretrained` that takes the student's code along, where config.json names it: one that was trained on must
    load elsewhere, too. Where that code itself runs, transformers copies it. Uploads would come first: refused."""

    def save_pretrained(
        self: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, *arguments: Any, **named: Any
    ) -> None:
        travels = "auto_map" in self.config.to_dict()
        if travels and inspect.signature(save).bind(self, "", True, *arguments, **named).arguments.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) uploads before the student's code is written, and what it uploads "
                "could not be loaded; call push_to_hub(repo_id) of the model, or `linearize push`"
            )
        save(self, save_directory, is_main_process, *arguments, **named)
        if is_main_process and travels:
            from linearize.remote_code import write_code

            write_code(self, Path(save_directory))

    return wraps(save)(save_pretrained)


STUDENT_CLASSES = {family.model_type: _make_classes(family) for family in FAMILIES.values()}

for _config_class, _model_class in STUDENT_CLASSES.values():
    _model_class.save_pretrained = _saving_code(_model_class.save_pretrained)  # type: ignore[method-assign]
    globals()[_config_class.__name__], globals()[_model_class.__name__] = _config_class, _model_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)

for _family in FAMILIES.values():
    if _mapping := get_checkpoint_conversion_mapping(_family.model_type):  # experts are stored one by one
        register_checkpoint_conversion_mapping(STUDENT_PREFIX + _family.model_type, _mapping, overwrite=True)
