"""What an attention module of a family is like: its heads, their sizes, its window; and why no mixer would fit it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from linearize.families.base import Fused, ModelFamily
from linearize.mixers.base import HeadShapes


def sizes_of(projection: nn.Module, family: ModelFamily) -> tuple[int, int]:
    """Columns and rows of a projection: what it takes and what it returns."""
    names = {"Linear": ("in_features", "out_features"), "Conv1D": ("nx", "nf")}[family.linear]
    columns, rows = (getattr(projection, name) for name in names)
    return columns, rows


def heads_of(family: ModelFamily, config: PreTrainedConfig) -> tuple[int, int]:
    """Query heads and key/value heads."""
    heads: int = config.num_attention_heads
    key_heads: int = heads if family.key_heads is None else getattr(config, family.key_heads)
    return heads, key_heads


def window_of(family: ModelFamily, config: PreTrainedConfig, layer: int) -> int | None:
    """The sliding window of a layer's softmax; None where it sees every token before it.

    A window that holds the longest sequence is none: Phi-4 mini has one of 262,144 tokens.
    """
    if family.window is None:
        return None
    window: int | None = getattr(config, family.window.size)
    slides = family.window.layers == "all" or config.layer_types[layer] == "sliding_attention"
    return window if slides and window is not None and window < config.max_position_embeddings else None


def head_shapes(attention: nn.Module, family: ModelFamily, config: PreTrainedConfig) -> HeadShapes:
    """Sizes read off the projections themselves: head_dim may differ from hidden / heads.

    The first projection is the query's, or holds all three, whose heads then have one width.
    """
    heads, key_heads = heads_of(family, config)
    found = [sizes_of(attention.get_submodule(name), family) for name in family.projections.names]
    fused = isinstance(family.projections, Fused)
    layer: int = attention.layer_idx  # type: ignore[assignment]
    return HeadShapes(
        width=found[0][0],
        query_heads=heads,
        key_heads=key_heads,
        key_width=found[0][1] // (heads + 2 * key_heads if fused else heads),
        value_width=found[-1][1] // (heads + 2 * key_heads if fused else key_heads),
        scaling=attention.scaling,  # type: ignore[arg-type]
        soft_cap=None if family.soft_cap is None else getattr(config, family.soft_cap),
        window=window_of(family, config, layer),
        rotates=family.positions == "rotary"
        and (family.rope_layers is None or bool(getattr(config, family.rope_layers)[layer])),
    )


def find_misfits(attention: nn.Module, family: ModelFamily, config: PreTrainedConfig) -> list[str]:
    """Every reason why a mixer cannot take this module's place; empty when it can."""
    names = {name for name, _ in attention.named_children()}
    missing = [name for name in family.submodules if name not in names]
    if missing:
        return [f"no projection {', '.join(missing)} (found: {', '.join(sorted(names)) or 'none'})"]
    misfits = [f"parameter {name} outside the projections" for name, _ in attention.named_parameters(recurse=False)]
    if unknown := sorted(names - set(family.pieces)):
        misfits.append(f"nothing is known of its {', '.join(unknown)}")
    norm = family.norm
    if norm is not None and (norm.switch is None or getattr(config, norm.switch)):
        misfits += [f"no norm {name}" for name in (norm.query, norm.key) if name not in names]
    if not attention.is_causal:
        misfits.append("it attends in both directions")
    heads, key_heads = heads_of(family, config)
    if heads % key_heads:
        misfits.append(f"{heads} query heads do not divide into {key_heads} key/value heads")
    fused = isinstance(family.projections, Fused)
    parts = [heads + 2 * key_heads] if fused else [heads, key_heads, key_heads]
    for name, count in zip(family.projections.names, parts, strict=True):
        rows = sizes_of(attention.get_submodule(name), family)[1]
        if rows % count:
            misfits.append(f"{name} has {rows} rows, which {count} heads do not divide")
    return misfits or _wrong_sizes(attention, family, config)


def _wrong_sizes(attention: nn.Module, family: ModelFamily, config: PreTrainedConfig) -> list[str]:
    """Projections that divide into heads, but whose heads do not fit each other."""
    shapes = head_shapes(attention, family, config)
    wanted = dict(zip(family.projections.names, family.projections.rows(shapes), strict=True))
    rows = {name: sizes_of(attention.get_submodule(name), family)[1] for name in wanted}
    misfits = [f"{name} has {rows[name]} rows, not {wanted[name]}" for name in wanted if rows[name] != wanted[name]]
    columns, mixed = (
        sizes_of(attention.get_submodule(family.output), family)[0],
        shapes.query_heads * shapes.value_width,
    )
    if columns != mixed:
        misfits.append(f"{family.output} takes {columns} columns, the heads have {mixed}")
    return misfits
