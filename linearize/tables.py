"""What the command line prints, as rich renderables made from results."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linearize.audit import Audit
from linearize.doctor import Finding
from linearize.evals.samples import PROMPT
from linearize.families import ModelFamily
from linearize.measuring import Converted
from linearize.memory import StageMemory
from linearize.planning import Plan, Prediction
from linearize.recipe import Recipe


def _table(title: str, *columns: str) -> Table:
    """Left-aligned first column, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def conversion_report(result: Converted) -> RenderableType:
    """Perplexities stage by stage, a sample of both models, and where the student lies."""
    sources = list(result.teacher.perplexity)
    table = _table(f"Perplexity on held-out text, windows of {result.length:,} tokens", "", *sources)
    table.add_row("teacher", *(f"{result.teacher.perplexity[source]:,.2f}" for source in sources))
    table.add_row("student, untrained", *(f"{result.untrained[source]:,.2f}" for source in sources))
    for stage in result.stages:
        found = [stage["metrics"].get(f"eval/{source}") for source in sources]
        table.add_row(f"student after {stage['name']}", *("-" if value is None else f"{value:,.2f}" for value in found))
    table.add_row("student, reloaded from disk", *(f"{result.student.perplexity[source]:,.2f}" for source in sources))
    ratios = (result.student.perplexity[source] / result.teacher.perplexity[source] for source in sources)
    table.add_row("student / teacher", *(f"{ratio:.2f}" for ratio in ratios))
    speeds = ", ".join(
        f"{stage['name']} {stage['tokens']:,} tokens at {stage['tokens_per_second']:,.0f}/s" for stage in result.stages
    )
    folder, quoted = (escape(text) for text in (str(result.folder), shlex.quote(str(result.folder))))
    lines = [
        f"Trained: {speeds}.",
        f"[bold]Prompt[/bold]   {escape(PROMPT)}",
        f"[bold]Teacher[/bold]  {escape(' '.join(result.teacher.sample.split()))}",
        f"[bold]Student[/bold]  {escape(' '.join(result.student.sample.split()))}",
        f"The student lies in [bold]{folder}[/bold]. Next: linearize doctor {quoted}",
    ]
    return Group(table, *lines)


def plan_report(plan: Plan) -> RenderableType:
    """The surgery, and what it costs here."""
    shapes = plan.swaps[0].shapes if plan.swaps else None
    facts = Table.grid(padding=(0, 2))
    students = f"{len(plan.swaps)} of {plan.layers} layers become {plan.recipe.mixer.kind}"
    rows = [
        ("Teacher", plan.teacher.origin),
        ("Machine", f"{plan.machine.name}, {plan.machine.precision}: {plan.machine.why}"),
        ("Surgery", students),
        ("Layers", _ranges([swap.layer for swap in plan.swaps])),
    ]
    if shapes is not None:
        heads = f"{shapes.query_heads} query, {shapes.key_heads} key/value, width {shapes.key_width}"
        rows += [
            ("Heads", heads),
            ("Parameters added", f"{plan.parameters:,} ({plan.parameters / _size(plan):.2%} of the teacher's)"),
            (
                "Decoding state",
                f"{_bytes(plan.state_bytes)} per sequence of any length; smaller than the keys and values it replaces "
                f"({_bytes(plan.key_value_bytes)} per token) from {plan.crossover_tokens:,} tokens on",
            ),
        ]
        if shapes.soft_cap is not None:
            cap = f"the teacher caps them at {shapes.soft_cap:g} by tanh; no mixer does"
            rows.append(("Scores", cap))
    if plan.sliding:
        widths = ", ".join(f"{window:,}" for window in sorted(set(plan.sliding.values())))
        kept = f"{_ranges(sorted(plan.sliding))}: they slide over {widths} tokens already"
        rows.append(("Left softmax", f"{kept}; replace_sliding: true replaces them too"))
    if plan.teacher_bytes:
        rows.append(
            (
                "Frozen teacher",
                f"{_bytes(plan.teacher_bytes)}: a second copy of the weights, because a stage trains the first",
            )
        )
    for name, value in rows:
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    table = _table("Stages, measured on one batch here", "stage", "tokens", "steps", "tokens/s", "time", "peak memory")
    memory = _table("What trains", "stage", "trains", "parameters", "fp32 weights", "AdamW moments")
    for cost in plan.stages:
        table.add_row(
            cost.name,
            f"{cost.tokens:,}",
            f"{cost.steps:,}",
            f"{cost.tokens_per_second:,.0f}",
            _clock(cost.seconds),
            _bytes(cost.peak_memory_bytes),
        )
        memory.add_row(
            cost.name,
            ", ".join(cost.parts),
            f"{cost.trained:,}",
            _bytes(cost.master_bytes),
            _bytes(cost.moment_bytes),
        )
    budget = f"A budget of --tokens {plan.tokens_in_time:,} would train in about 15 minutes."
    audited = [] if plan.audit is None else [audit_report(plan.audit)]
    predicted = [memory_table(plan.memory)] if plan.memory else []
    return Group(facts, table, memory, *predicted, budget, *audited)


def prediction_report(found: Prediction) -> RenderableType:
    """What a conversion would need on a machine that is not here."""
    target = found.target
    how = f"{target.device}, {target.precision}" + (", layers streamed from host memory" if target.streamed else "")
    if target.processes > 1:
        how = f"{target.processes} processes, split {target.split}, each on {how}; of the one that needs most"
    return Group(f"[bold]{escape(found.model)}[/bold] on {how}", memory_table(found.memory))


def memory_table(stages: Sequence[StageMemory]) -> Table:
    """Predicted peak memory by term, a column a stage."""
    names = [f"{number} {stage.name}" for number, stage in enumerate(stages)]
    table = _table("Peak memory of training, predicted", "term", *names)
    terms = {term: None for stage in stages for term in stage.terms}
    for term in terms:
        table.add_row(term, *(_bytes(stage.terms[term]) if term in stage.terms else "-" for stage in stages))
    table.add_section()
    table.add_row("together", *(_bytes(stage.peak) for stage in stages))
    table.add_row("reached in", *(stage.peak_in for stage in stages))
    return table


def audit_report(audit: Audit) -> RenderableType:
    """Each layer's error at step 0, gates and shares, and whether the student sees the teacher's heads."""
    title = f"The untrained student beside its teacher on {audit.tokens} tokens of {escape(audit.text)}"
    columns = ["error", "worst head", "keeps a token, p1 / p50 / p99", "linear share, p1 / p50 / p99", "recomputed"]
    table = _table(title, "layer", *columns)
    for layer in audit.layers:
        gate = "-" if layer.log_gate is None else " / ".join(f"{math.exp(value):.4f}" for value in layer.log_gate)
        share = "-" if layer.linear_share is None else " / ".join(f"{value:.3f}" for value in layer.linear_share)
        worst = layer.worst_head
        table.add_row(
            str(layer.layer),
            f"{layer.error:.3f}",
            f"{layer.head_errors[worst]:.3f} ({worst})",
            gate,
            share,
            f"{layer.recomputed:.0e}{' !' if layer.layer in audit.misread else ''}",
        )
    facts = Table.grid(padding=(0, 2))
    for name, value in audit.heads.items():
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    verdict = (
        f"Mean error {audit.error:.3f} (0: the teacher; 1: no better than silence). The teacher's attention follows "
        f"from the heads that the student sees in every layer (tolerance {audit.tolerance:g})."
    )
    if audit.misread:
        verdict = (
            f"[red]Layers {_ranges(audit.misread)}: the teacher's attention does not follow from the heads that the "
            "student sees.[/red] Head order, a bias, a norm on q or k, the scaling or RoPE differs from what "
            "linearize/families/ says of this model; a student of such layers learns from the wrong heads."
        )
    return Group("", table, facts, verdict)


def _size(plan: Plan) -> int:
    """Parameters of the teacher; the model was grafted to be measured, so the mixers' own are taken off."""
    adapters = sum(p.numel() for name, p in plan.teacher.model.named_parameters() if "lora_" in name)
    return sum(parameter.numel() for parameter in plan.teacher.model.parameters()) - plan.parameters - adapters


def _ranges(numbers: Sequence[int]) -> str:
    """`0-4, 6, 8-9` for the layers that are replaced."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def doctor_report(findings: Sequence[Finding]) -> RenderableType:
    """One line a check, the verdict below."""
    table = _table("Largest difference of logits, relative to the largest logit", "check", "difference", "allowed", "")
    table.add_column("how", justify="left")
    for finding in findings:
        verdict = "[green]ok[/green]" if finding.passed else "[bold red]FAILED[/bold red]"
        table.add_row(finding.check, f"{finding.difference:.1e}", f"{finding.tolerance:.0e}", verdict, finding.note)
    failed = [finding.check for finding in findings if not finding.passed]
    bad = f"[bold red]{len(failed)} failed: {', '.join(failed)}[/bold red]"
    verdict = bad if failed else "[green]All passed.[/green]"
    return Group(table, verdict)


def findings_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as plain data."""
    return [
        {
            "check": finding.check,
            "difference": finding.difference,
            "tolerance": finding.tolerance,
            "passed": finding.passed,
            "note": finding.note,
        }
        for finding in findings
    ]


def recipes_report(recipes: Sequence[Recipe]) -> RenderableType:
    """Name, mixer, stages, budget and paper of each recipe."""
    table = Table(title="Recipes", title_justify="left")
    for column in ("name", "mixer", "keeps softmax", "stages", "tokens", "paper"):
        table.add_column(column)
    for recipe in recipes:
        stages = " > ".join(stage.kind for stage in recipe.stages)
        kept = "none" if recipe.keep_softmax == "none" else str(recipe.keep_softmax)
        table.add_row(recipe.name, recipe.mixer.kind, kept, stages, f"{recipe.tokens / 1e6:g}M", recipe.paper)
    return table


def families_report(families: Iterable[ModelFamily]) -> RenderableType:
    """What each family is special for, and the pieces of its attention that are checked before surgery."""
    table = Table(title="Model families", title_justify="left")
    for column in ("family", "such as", "what is special", "checked pieces"):
        table.add_column(column)
    for family in families:
        table.add_row(family.model_type, "\n".join(family.examples), family.special, ", ".join(family.checked))
    said = "A module or parameter of attention that is not among the checked pieces is refused, never ignored."
    return Group(table, said)
