"""The page: one HTML file without scripts, fonts or links to other files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from linearize.evals.crossover import crossover
from linearize.evals.records import TaskRow
from linearize.report.charts import FORMATS, Chart
from linearize.report.facts import RunFacts
from linearize.report.figures import figures, slug, table
from linearize.report.markup import Child, Markup, join, tag
from linearize.report.measured import (
    COSTS,
    diagnostic_charts,
    perplexity_charts,
    probe_charts,
    recall_charts,
    speed_charts,
)
from linearize.report.results import Measure, measures, recovered, task_pairs
from linearize.report.svg import SHADES, TONES
from linearize.report.training import trained_tokens, training_charts

Score = Literal["accuracy", "accuracy_norm"]


class Section(NamedTuple):
    """A part of the page with its charts; without content it is left out."""

    title: str
    said: str
    charts: Sequence[Chart]
    more: Markup | None = None


def sections(runs: Sequence[RunFacts]) -> list[Section]:
    """What was measured, in the order of the page."""
    single = runs[0] if len(runs) == 1 else None
    found = [
        Section(
            "Training",
            "Points and cells tell their numbers on hover; lists of them are below the charts.",
            training_charts(runs),
        ),
        Section(
            "Perplexity", "Windows start without context; the dashed line is the teacher.", perplexity_charts(runs)
        ),
        Section("Recall", "A fact hidden in a long context, asked for at its end.", recall_charts(runs)),
        Section(
            "Branch probe",
            "The same student with its linear branch or its window switched off: which of them does the work.",
            [] if single is None else probe_charts(single),
        ),
        Section(
            "Tasks",
            "Zero-shot accuracy with standard errors; “by length” divides scores by the length of the answer.",
            [],
            _tasks(runs),
        ),
        Section(
            "Diagnostics",
            "Where student and teacher differ inside.",
            [] if single is None else diagnostic_charts(single),
        ),
        Section("Speed and memory", "Medians at equal settings.", speed_charts(runs), _speed_notes(runs)),
    ]
    return [section for section in found if section.charts or section.more is not None]


def page(runs: Sequence[RunFacts], parts: Sequence[Section]) -> str:
    """The whole document."""
    title = _title(runs[0]) if len(runs) == 1 else f"{len(runs)} students compared"
    top = _single_top(runs[0]) if len(runs) == 1 else _compared_top(runs)
    end = [_samples(runs), *(_provenance(run, len(runs) > 1) for run in runs)]
    names = [*(part.title for part in parts), "Samples", "Provenance"]
    links = (tag("a", {"href": f"#{slug(name)}"}, name) for name in names)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = tag(
        "main",
        None,
        tag("header", None, tag("h1", None, title), *top.lead, tag("nav", {"aria-label": "Sections"}, *links)),
        *top.content,
        *(_section(part) for part in parts),
        *end,
        tag("footer", None, f"Written by linearize on {written}. Every number is also in report.json."),
    )
    head = tag(
        "head",
        None,
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", None, title),
        tag("style", None, Markup(_style())),
    )
    return "<!doctype html>\n" + tag("html", {"lang": "en"}, head, tag("body", None, body)) + "\n"


def _style() -> str:
    """The style sheet, and one class for every colour of a line and every shade of a heat map."""
    sheet = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    tones = "".join(f".tone{n}{{--tone:var(--tone{n})}}" for n in range(TONES))
    shades = "".join(
        f".h{n}{{fill:color-mix(in oklab,var(--heat-high) {100 * n // SHADES}%,var(--heat-low))}}"
        for n in range(SHADES + 1)
    )
    return sheet + tones + shades


class _Top(NamedTuple):
    lead: list[Markup]
    content: list[Child]


def _title(run: RunFacts) -> str:
    return f"{_teacher_name(run)} → {run.facts.get('recipe', 'student')}"


def _teacher_name(run: RunFacts) -> str:
    name = str(run.facts.get("teacher", {}).get("name", run.facts.get("model", "teacher")))
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def _single_top(run: RunFacts) -> _Top:
    mixer = run.recipe.get("mixer", {}).get("kind", run.facts.get("recipe"))
    lead = f"A linear-attention student of {_teacher_name(run)}: softmax attention replaced by {mixer}, {_layers(run)}."
    found = measures(run)
    content: list[Child] = [_missing(run)]
    if found:
        content += [_heading("Result"), _result_table(found)]
    content += [_heading("Conversion"), _conversion(run)]
    return _Top([tag("p", {"class": "lead"}, lead)], content)


def _heading(title: str) -> Markup:
    return tag("h2", {"id": slug(title)}, title)


def _section(part: Section) -> Markup:
    return tag(
        "section",
        None,
        _heading(part.title),
        tag("p", None, part.said),
        figures(part.charts) if part.charts else None,
        part.more,
    )


def _layers(run: RunFacts) -> str:
    """`in all 30 layers`."""
    entry, count = run.config.get("linearize"), run.config.get("num_hidden_layers")
    if not isinstance(entry, dict) or "layers" not in entry or not count:
        return "layers as the recipe says"
    changed = len(entry["layers"])
    return f"in all {count} layers" if changed == count else f"in {changed} of {count} layers"


def _missing(run: RunFacts) -> Markup | None:
    if not run.missing:
        return None
    said = "Not measured yet" if run.finished else "This run has not ended; the page shows what there is. Missing"
    items = (tag("li", None, f"{what}: ", tag("code", None, command)) for what, command in run.missing)
    return tag("div", {"class": "notice"}, tag("p", None, f"{said}:"), tag("ul", None, *items))


def _cell(measure: Measure, value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    shown = FORMATS[measure.format](value)
    if error is None:
        return shown
    told = f"{error:.2g}" if measure.format == "exact" else FORMATS[measure.format](error)
    return join([shown, " ", tag("small", None, f"± {told}")])


def _result_table(found: Sequence[Measure]) -> Markup:
    rows = [
        [
            measure.label,
            _cell(measure, measure.teacher, measure.teacher_error),
            _cell(measure, measure.student, measure.student_error),
            "–" if measure.ratio is None else f"{measure.ratio:.3g}",
        ]
        for measure in found
    ]
    return table(["", "teacher", "student", "ratio"], rows)


def _compared_top(runs: Sequence[RunFacts]) -> _Top:
    """One table: what was converted, and every measure with its ratio to the teacher."""
    found = {run.name: {measure.label: measure for measure in measures(run)} for run in runs}
    facts: list[tuple[str, list[str]]] = [
        ("recipe", [str(run.facts.get("recipe")) for run in runs]),
        ("layers replaced", [_layers(run).removeprefix("in ") for run in runs]),
        ("training tokens", [f"{trained_tokens(run):,}" for run in runs]),
        ("seed", [str(run.facts.get("seed")) for run in runs]),
        ("ended", ["yes" if run.finished else "no" for run in runs]),
    ]
    rows = [[name, "", *values] for name, values in facts]
    for label in dict.fromkeys(label for measured in found.values() for label in measured):
        own = [found[run.name].get(label) for run in runs]
        teacher = next(_cell(m, m.teacher, m.teacher_error) for m in own if m is not None)
        rows.append([label, teacher, *("–" if m is None else _with_ratio(m) for m in own)])
    lead = f"{', '.join(run.name for run in runs)}: ratios to the teacher in brackets."
    same = len({str(run.facts.get("teacher", {}).get("sha256")) for run in runs}) == 1
    note = (
        None
        if same
        else tag("div", {"class": "notice"}, tag("p", None, "The teachers differ; the column shows the first."))
    )
    missing = (
        tag("details", None, tag("summary", None, f"Not measured of {run.name}"), _missing(run))
        for run in runs
        if run.missing
    )
    names = ["", "teacher", *(run.name for run in runs)]
    return _Top([tag("p", {"class": "lead"}, lead)], [note, _heading("Result"), table(names, rows), *missing])


def _with_ratio(measure: Measure) -> str:
    shown = _cell(measure, measure.student, measure.student_error)
    return shown if measure.ratio is None else join([shown, f" ({measure.ratio:.3g})"])


def _conversion(run: RunFacts) -> Markup:
    """Recipe, text, budget, hashes."""
    facts, recipe = run.facts, run.recipe
    teacher, text = facts.get("teacher", {}), facts.get("text", {})
    mixer = ", ".join(
        f"{key} {value}" if not isinstance(value, bool) else (key if value else f"not {key}")
        for key, value in recipe.get("mixer", {}).items()
        if value is not None
    )
    stages = [
        f"{stage['kind']}: {stage['tokens']:,} tokens of length {stage['length']:,}, "
        f"trains {', '.join(stage.get('train', []))}"
        for stage in recipe.get("stages", [])
    ]
    trained = [
        f"{s['name']}: {s['tokens']:,} tokens in {s['seconds']:,.0f} s ({s['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {FORMATS['bytes'](s['peak_memory_bytes'])}"
        for s in run.results.get("stages", [])
    ]
    said: list[tuple[str, Any]] = [
        ("teacher", teacher.get("origin")),
        ("license", teacher.get("license")),
        ("teacher's sha256", teacher.get("sha256")),
        ("teacher's revision", teacher.get("revision")),
        ("recipe", f"{facts.get('recipe')} ({recipe.get('paper') or 'no paper'})"),
        ("recipe's hash", facts.get("recipe_hash")),
        ("mixer", mixer),
        ("layers kept softmax", str(recipe.get("keep_softmax", ""))),
        *(("stage", stage) for stage in stages),
        *(("trained", each) for each in trained),
        ("training text", text.get("name")),
        ("text's fingerprint", text.get("fingerprint")),
        ("passes over the text", FORMATS["number"](text["epochs"]) if "epochs" in text else None),
    ]
    return _definitions(said)


def _definitions(said: Sequence[tuple[str, Any]]) -> Markup:
    pairs = [(name, str(value)) for name, value in said if value not in (None, "")]
    return tag("dl", None, *(part for name, value in pairs for part in (tag("dt", None, name), tag("dd", None, value))))


def _tasks(runs: Sequence[RunFacts]) -> Markup | None:
    rows = []
    for run in runs:
        for task, teacher, student in task_pairs(run):
            name = task if len(runs) == 1 else f"{task}, {run.name}"
            rows.append([name, *_task_cells(teacher, student, "accuracy")])
            if any(row is not None and row.accuracy_norm is not None for row in (teacher, student)):
                rows.append([f"{name}, by length", *_task_cells(teacher, student, "accuracy_norm")])
            if any(row is not None and row.perplexity is not None for row in (teacher, student)):
                values = [None if row is None else row.perplexity for row in (teacher, student)]
                cells = ["–" if value is None else FORMATS["exact"](value) for value in values]
                rows.append([f"{name}, perplexity", *cells, "", "", "", ""])
    head = ["", "teacher", "student", "recovered", "beyond chance", "paired p", "n"]
    return table(head, rows) if rows else None


def _task_cells(teacher: TaskRow | None, student: TaskRow | None, score: Score) -> list[str]:
    """Both accuracies with errors, the share that the student keeps, with and without chance, the paired test, n."""
    share, scores = FORMATS["share"], []
    cells = []
    for row in (teacher, student):
        found = {} if row is None else row.model_dump()
        value, error = found.get(score), found.get(f"{score}_error")
        scores.append(value)
        cells.append("–" if value is None else share(value) if error is None else f"{share(value)} ± {share(error)}")
    kept: list[float | None] = [None, None]
    if teacher is not None and scores[0] is not None and scores[1] is not None:
        kept[0] = recovered(scores[1], scores[0], 0.0)
        kept[1] = None if teacher.chance is None else recovered(scores[1], scores[0], teacher.chance)
    cells += ["–" if value is None else share(value) for value in kept]
    tested = student.paired_p if student is not None and score == "accuracy" else None
    count = next(row.count for row in (student, teacher) if row is not None)
    return [*cells, "–" if tested is None else f"{tested:.2g}", f"{count:,}"]


def _speed_notes(runs: Sequence[RunFacts]) -> Markup | None:
    """How it was timed, and where student and teacher cross."""
    said: list[tuple[str, Any]] = []
    for run in runs:
        if not run.speed:
            continue
        whose = "" if len(runs) == 1 else f", {run.name}"
        for batch in dict.fromkeys(row.batch for row in run.speed):
            rows = [row for row in run.speed if row.batch == batch]
            for mode, title, cost, *_ in COSTS:
                crossed = crossover(rows, mode, cost)
                if crossed is not None:
                    said.append((f"{title.lower()}, batch {batch}{whose}", crossed.in_words()))
        said.append((f"device{whose}", run.made["speed"].device))
        hows = {
            f"{r.model}, {r.mode}: {r.dtype}, {r.attention}{', CUDA graph' if r.cuda_graph else ''}"
            f"{f', {r.note}' if r.note else ''}"
            for r in run.speed
        }
        said += [(f"timed{whose}", how) for how in sorted(hows)]
    return _definitions(said) if said else None


def _samples(runs: Sequence[RunFacts]) -> Markup:
    told = [run for run in runs if "samples" in run.results]
    if not told:
        said = "The run writes them at its end."
        return tag("section", None, _heading("Samples"), tag("p", None, said))
    prompt = told[0].results["samples"]["prompt"]
    texts = [("teacher", told[0].results["samples"]["teacher"])]
    texts += [("student" if len(runs) == 1 else run.name, run.results["samples"]["student"]) for run in told]
    quotes = (
        tag("div", None, tag("h3", None, name), tag("blockquote", {"class": "" if n == 0 else "student"}, text.strip()))
        for n, (name, text) in enumerate(texts)
    )
    intro = tag("p", None, "Greedy continuations of ", tag("code", None, prompt))
    return tag("section", None, _heading("Samples"), intro, tag("div", {"class": "samples"}, *quotes))


def _provenance(run: RunFacts, named: bool) -> Markup:
    facts = run.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items())
    said = [
        ("device", facts.get("device")),
        ("precision", facts.get("precision")),
        ("seed", facts.get("seed")),
        ("teacher's attention", facts.get("teacher", {}).get("attention")),
        ("versions", versions),
        ("folder", str(run.folder)),
    ]
    commands = [facts.get("command", ""), *(made.command for made in run.made.values())]
    others = [(f"{kind}, measured", f"{made.date} on {made.device}") for kind, made in run.made.items()]
    title = f"Provenance of {run.name}" if named else "Provenance"
    heading = tag("h2", {"id": "provenance" if not named else slug(title)}, title)
    code = tag("pre", None, "\n".join(dict.fromkeys(command for command in commands if command)))
    return tag("section", None, heading, _definitions([*said, *others]), code)
