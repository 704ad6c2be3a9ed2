"""A description of an unknown family, proposed by looking into a model. It is printed, never applied.

What the module tree and the configuration say is found: paths, projections, norms, window, cap. What only the source
says is not: how heads lie in a fused projection, which channels RoPE pairs, clipping. `linearize plan --audit`
recomputes the teacher's attention from the heads of a described family, and so finds out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from inspect import signature

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearize.families.base import Fused, ModelFamily, NormOver, QueryKeyNorm, Split, Window

QUERY, KEY, VALUE = ("q_proj", "query", "wq"), ("k_proj", "key", "wk"), ("v_proj", "value", "wv")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "att_proj")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out", "proj")
CACHES = ("past_key_values", "layer_past", "past_key_value")
ATTRIBUTES = ("layer_idx", "scaling", "is_causal")
"""What surgery reads off an attention module."""


@dataclass(frozen=True)
class Proposal:
    """What was found: the description, None where it cannot be begun; and which pieces were not understood."""

    family: ModelFamily | None
    unknown: tuple[str, ...]

    @property
    def text(self) -> str:
        """The description as Python, with the fields that differ from their defaults; what is unknown as comments."""
        comments = [f"# not understood: {piece}" for piece in self.unknown]
        if self.family is None:
            return "\n".join(comments)
        values = {field.name: (getattr(self.family, field.name), field.default) for field in fields(ModelFamily)}
        lines = [f"    {name}={_text(value)}," for name, (value, default) in values.items() if value != default]
        return "\n".join([*comments, "ModelFamily(", *lines, ")"])


def propose(model: PreTrainedModel) -> Proposal:
    """Describe a model of an unknown family as far as it can be seen."""
    count: int = model.config.num_hidden_layers
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        return Proposal(None, (f"which list of modules holds the {count} decoder layers (found: {found})",))
    ((path, layers),) = lists.items()
    attentions = [name for name, child in layers[0].named_children() if "attention" in type(child).__name__.lower()]
    if len(attentions) != 1:
        found = ", ".join(attentions) or "none"
        return Proposal(None, (f"which module of a layer is its attention (found: {found})",))
    return _describe(model, path, attentions[0], layers[0].get_submodule(attentions[0]))


def _describe(model: PreTrainedModel, layers: str, name: str, attention: nn.Module) -> Proposal:
    config = model.config
    known = config.to_dict()
    children = dict(attention.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, (nn.Linear, Conv1D))}
    unknown = [f"attention has no `{attribute}`" for attribute in ATTRIBUTES if attribute not in vars(attention)]
    projections, output = _projections(linears, unknown)
    norm = _norm(children, config.num_attention_heads, unknown)
    idle = tuple(name for name, child in children.items() if isinstance(child, nn.Dropout))
    described = {*projections.names, output, *idle, *(() if norm is None else (norm.query, norm.key))}
    unknown += [f"module {child}" for child in children if child not in described]
    unknown += [f"parameter {name} of attention" for name, _ in attention.named_parameters(recurse=False)]
    arguments = signature(attention.forward).parameters
    cache = _first(CACHES, arguments)
    if cache is None:
        unknown.append("the argument that attention gets the cache in")
    if "position_embeddings" not in arguments:
        unknown.append("positions: attention takes no `position_embeddings`; learned, if they are added to embeddings")
    if isinstance(projections, Fused):
        unknown.append(f"layout of {projections.name}: in blocks, or head by head")
    typed = known.get("layer_types") is not None
    window = Window("layer_types" if typed else "all") if known.get("sliding_window") is not None else None
    family = ModelFamily(
        model_type=config.model_type,
        config_class=type(config).__name__,
        causal_lm=type(model).__name__,
        examples=(),
        special="",
        trunk=layers.rpartition(".")[0],
        layers=layers,
        attention=name,
        projections=projections,
        output=output,
        linear="Conv1D" if any(isinstance(child, Conv1D) for child in linears.values()) else "Linear",
        norm=norm,
        idle=idle,
        key_heads="num_key_value_heads" if "num_key_value_heads" in known else None,
        positions="rotary" if "position_embeddings" in arguments else "learned",
        soft_cap="attn_logit_softcapping" if known.get("attn_logit_softcapping") is not None else None,
        window=window,
        cache=cache or CACHES[0],
        reads_layer_types=typed,
    )
    return Proposal(family, tuple(unknown))


def _projections(linears: Mapping[str, nn.Module], unknown: list[str]) -> tuple[Split | Fused, str]:
    """The projections by the names that are common; what is not found goes to `unknown`."""
    output = _first(OUTPUT, linears)
    if output is None:
        unknown.append(f"the output projection (linear maps: {', '.join(linears) or 'none'})")
    fused = _first(FUSED, linears)
    if fused is not None:
        return Fused(fused, "blocks"), output or OUTPUT[0]
    three = [_first(names, linears) for names in (QUERY, KEY, VALUE)]
    if None in three:
        unknown.append(f"the projections of q, k and v (linear maps: {', '.join(linears) or 'none'})")
    q, k, v = (name or common[0] for name, common in zip(three, (QUERY, KEY, VALUE), strict=True))
    return Split(q, k, v), output or OUTPUT[0]


def _norm(children: dict[str, nn.Module], heads: int, unknown: list[str]) -> QueryKeyNorm | None:
    """Norms on q and k by their names; over what, by the number of weights on q and the columns of the output."""
    names = [name for name in children if "norm" in name.lower()]
    if not names:
        return None
    found = {name[:1]: name for name in names}
    weights = [parameter for name in names if name[:1] == "q" for parameter in children[name].parameters()]
    if len(names) != 2 or found.keys() != {"q", "k"} or not weights:
        unknown.append(f"what {', '.join(names)} normalise")
        return None
    output = next(children[name] for name in OUTPUT if name in children)
    columns = int(output.nx if isinstance(output, Conv1D) else output.in_features)  # type: ignore[arg-type]
    over: dict[int, NormOver] = {columns: "projection", columns // heads: "head"}
    size = weights[0].numel()
    kind = "each head" if len(weights) >= heads else over.get(size)
    if kind is None:
        unknown.append(f"what {', '.join(names)} normalise: {size} weights, {heads} heads of {columns // heads}")
        return None
    return QueryKeyNorm(found["q"], found["k"], kind)


def _first(names: tuple[str, ...], among: Iterable[str]) -> str | None:
    found = set(among)
    return next((name for name in names if name in found), None)


def _text(value: object) -> str:
    """Literal Python with double quotes, as our files have it."""
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value).replace("'", '"')
