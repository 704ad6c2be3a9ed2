"""The page says what a run's files say, escapes what they hold, needs nothing but itself, and draws in a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from browser import Browser, browser, find_chromium

from linearize.cli import app
from linearize.errors import RunError
from linearize.evals.records import (
    BRANCHES,
    DiagnosticRow,
    Made,
    PerplexityRow,
    PositionRow,
    RecallRow,
    SpeedRow,
    TaskRow,
    write_rows,
)
from linearize.report import write_report
from linearize.report.charts import (
    FORMATS,
    Heat,
    Lines,
    Point,
    Series,
    heat_share,
    measured_ticks,
    plotted,
    thinned,
    ticks,
)
from linearize.report.facts import RunFacts
from linearize.report.svg import draw
from linearize.report.training import training_charts

LAYERS, STEPS = 6, 200
HOSTILE = "<script>alert('student')</script> & \"quotes\""
MADE = Made(date="2026-01-02T03:04:05+00:00", device="test device", command="linearize measure it", versions={})
FACTS: dict[str, Any] = {
    "model": "tiny",
    "teacher": {"name": "hub/tiny", "origin": "somewhere", "revision": None, "sha256": "ab12", "license": "mit"},
    "recipe": "lizard",
    "recipe_hash": "cd34",
    "text": {"name": "a text", "fingerprint": "ef56", "epochs": 1.5},
    "device": "test device",
    "precision": "fp32",
    "seed": 0,
    "versions": {"linearize": "0"},
    "command": "linearize convert --model tiny",
}


def records() -> Iterator[dict[str, Any]]:
    """Of two stages; the losses fall."""
    for stage, name in enumerate(("transfer", "distil")):
        for step in range(1, STEPS + 1):
            record = {"stage": stage, "name": name, "step": step, "tokens": 100 * step, "loss": 1 / step}
            if stage == 0:
                record |= {f"error/layer_{layer:02d}": 0.1 * (layer + 1) / step for layer in range(LAYERS)}
            if step % 100 == 0:
                record |= {"eval/held-out": 20 - 4 * stage - step / 100, "eval/error": 0.1}
                record |= {f"eval/error/layer_{layer:02d}": 0.1 for layer in range(LAYERS)}
                record |= {f"eval/error/layer_{layer:02d}/head_00": 0.1 for layer in range(LAYERS)}
                record |= {f"eval/linear_share_{rank}/layer_00": 0.5 for rank in ("p1", "p50", "p99")}
            yield record


def write_run(folder: Path, *, finished: bool = True, student: float = 15.0) -> Path:
    """A run's small files, without its weights."""
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "run.json").write_text(json.dumps(FACTS))
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    stage = {"tokens": 20_000, "seconds": 10.0, "tokens_per_second": 2000.0, "peak_memory_bytes": 10**9}
    results = {"teacher": {"perplexity": {"held-out": 10.0}, "sample": "x"}, "untrained": {"held-out": 30.0}}
    (folder / "run" / "results.json").write_text(json.dumps({**results, "stage0": {"name": "transfer", **stage}}))
    if finished:
        row = {"source": "held-out", "length": 64, "teacher": 10.0, "student": student, "ratio": student / 10}
        rest = {"perplexity": [row], "untrained": {"held-out": 30.0}, "stages": [{"name": "transfer", **stage}]}
        samples = {"prompt": "a < b", "teacher": "fine", "student": HOSTILE}
        (folder / "metrics.json").write_text(json.dumps({**FACTS, **rest, "samples": samples}))
        recipe = {"name": "lizard", "paper": "", "mixer": {"kind": "lizard"}, "keep_softmax": "none"}
        stages = [{"kind": "transfer", "tokens": 20_000, "length": 64, "train": ["mixer"]}]
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages}))
        config = {"num_hidden_layers": LAYERS, "linearize": {"layers": [0, 2, 4]}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_evaluations(folder: Path) -> None:
    """Rows of every kind."""
    models, lengths = ("teacher", "student", *BRANCHES), (64, 256, 1024)
    write_rows(
        folder,
        "perplexity",
        [
            PerplexityRow(model=m, source="so <b>urce", length=n, tokens=n, nll=2.0 + 0.1 * i, standard_error=0.01)
            for i, m in enumerate(models)
            for n in lengths
        ],
        MADE,
    )
    positions = [
        PositionRow(model=m, source="prose", length=64, start=start, stop=2 * start, tokens=9, nll=2.0)
        for m in models[:2]
        for start in (1, 2, 4, 8)
    ]
    write_rows(folder, "positions", positions, MADE)
    recall = [
        RecallRow(model=m, task="passkey", length=n, depth=depth, count=4, correct=4 - i % 4)
        for i, m in enumerate(models)
        for n in lengths
        for depth in (0.0, 0.5, 1.0)
    ]
    write_rows(folder, "recall", recall, MADE)
    tasks = [
        TaskRow(
            model=m,
            task="piqa",
            count=100,
            accuracy=accuracy,
            accuracy_error=0.02,
            chance=0.5,
            accuracy_norm=0.65,
            perplexity=12.34,
            paired_p=0.03,
        )
        for m, accuracy in (("teacher", 0.7), ("student", 0.6))
    ]
    write_rows(folder, "tasks", tasks, MADE)
    measured = [("relative_error", 0.3), ("attention_kl", 0.2), ("teacher_entropy", 2.0), ("student_entropy", 2.5)]
    diagnostics = [
        DiagnosticRow(layer=layer, head=head, start=None, stop=None, measure=measure, value=value + 0.01 * layer)  # type: ignore[arg-type]
        for measure, value in measured
        for layer in range(LAYERS)
        for head in (None, 0, 1)
    ]
    write_rows(folder, "diagnostics", diagnostics, MADE)
    write_rows(folder, "speed", list(speeds(lengths)), MADE)


def speeds(lengths: tuple[int, ...]) -> Iterator[SpeedRow]:
    """The student's cost does not grow; the teacher's does, until nothing fits."""
    for model in ("teacher", "student"):
        for mode in ("prefill", "decode"):
            for length in lengths:
                lost = model == "teacher" and length == lengths[-1]
                cost = 100.0 if model == "student" else float(length)
                yield SpeedRow(
                    model=model,
                    mode=mode,  # type: ignore[arg-type]
                    length=length,
                    batch=1,
                    seconds=None if lost else cost / 1e3,
                    tokens_per_second=None if lost else 1e3 / cost,
                    peak_memory_bytes=None if lost else int(cost) * 10**6,
                    state_bytes=None if lost else int(cost) * 1000,
                    dtype="float32",
                    attention="sdpa",
                    cuda_graph=False,
                    out_of_memory=lost,
                )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "whole")
    write_evaluations(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report([run], images=False).read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    assert len(html) < 3_000_000
    for forbidden in ("<script", "http://", "https://", " src=", "@import", "url("):
        assert forbidden not in html


def test_text_of_runs_is_text_on_the_page(html: str) -> None:
    assert "&lt;script&gt;alert(&#x27;student&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;" in html
    assert "so &lt;b&gt;urce" in html
    assert "<b>urce" not in html


def test_drawings_are_well_formed(html: str) -> None:
    drawings = re.findall(r'<svg [^>]*role="img".*?</svg>', html, re.DOTALL)
    assert len(drawings) >= 15
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("aria-label")
        assert "nan" not in drawing.lower().replace("nano", "")


def test_the_page_says_what_was_measured(html: str) -> None:
    wanted = (
        "tiny → lizard", "in 3 of 6 layers", "ab12", "cd34", "ef56", "mit", "20,000 tokens of length 64",
        "Held-out perplexity, student over teacher", "error of each layer", "Branch probe", BRANCHES[0],
        # accuracy, recovered share, and that beyond chance
        "60.0 % ± 2.0 %", "85.7 %", "50.0 %", "piqa, by length",
        "12 questions a point", "12.3", ">0.03<",
        "Out of memory: teacher at 1,024", "smaller from about 100 tokens on", "linearize measure it",
        "Perplexity, held-out, 64 tokens", ">1.5<",
    )  # fmt: skip
    assert [text for text in wanted if text not in html] == []
    assert "Not measured yet" not in html


def test_numbers_lie_beside_the_page(run: Path, html: str) -> None:
    numbers = json.loads((run / "report" / "report.json").read_text())
    (only,) = numbers["runs"]
    assert only["measures"][0]["ratio"] == 1.5
    (heldout,) = [chart for chart in numbers["charts"] if chart["key"] == "heldout"]
    assert heldout["series"][0]["points"][0][:2] == [0.0, 3.0]
    assert heldout["series"][0]["points"][-1][:2] == [40_000.0, 1.4]
    (ratio,) = [chart for chart in numbers["charts"] if chart["key"] == "ratio"]
    assert [point[:2] for point in ratio["series"][0]["points"]] == [
        [n, pytest.approx(math.exp(0.1))] for n in (64, 256, 1024)
    ]


def test_sources_may_be_called_like_paths(tmp_path: Path) -> None:
    """Their names come from a column of the text; readings of layers have slashes too."""
    records = [
        {"stage": 0, "name": "distil", "step": 9, "tokens": 900, "loss": 1.0, "eval/books/old": 6.0, "eval/error": 0.2,
         "eval/error/layer_00": 0.2},
    ]  # fmt: skip
    row = {"source": "books/old", "length": 8, "teacher": 3.0, "student": 6.0, "ratio": 2.0}
    facts = RunFacts("run", tmp_path, {}, {}, {}, {"perplexity": [row], "untrained": {"books/old": 9.0}}, records, True)
    (chart,) = [chart for chart in training_charts([facts]) if chart.key == "heldout"]
    assert isinstance(chart, Lines)
    assert [(point.x, point.y) for point in chart.series[0].points] == [(0.0, 3.0), (900.0, 2.0)]


def test_a_run_that_has_not_ended_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "part", finished=False)
    html = write_report([folder], images=False).read_text(encoding="utf-8")
    assert "This run has not ended" in html
    assert "linearize convert --model tiny --resume" in html
    assert f"linearize speed {folder}" in html
    assert "Held-out perplexity, student over teacher" in html


def test_runs_are_compared_in_one_table_and_the_same_axes(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", student=12.0)
    html = write_report([run, other], tmp_path / "both" / "page.html", images=False).read_text(encoding="utf-8")
    assert "2 students compared" in html
    assert "15.0 (1.5)" in html
    assert "12.0 (1.2)" in html
    assert html.count("<td>40,000</td>") == 2  # tokens of both runs
    numbers = json.loads((tmp_path / "both" / "report.json").read_text())
    (heldout,) = [chart for chart in numbers["charts"] if chart["key"] == "heldout"]
    assert [line["name"] for line in heldout["series"]] == ["whole", "other"]
    assert html.count("Provenance of") == 2


@pytest.mark.parametrize(
    "file, content, said",
    [
        (None, "", "nothing to report"),
        ("metrics.json", "{", "cannot be read"),
        ("evals/speed.json", '{"rows": [{"model": 3}], "made": {}}', "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, file: str | None, content: str, said: str) -> None:
    folder = tmp_path / "broken"
    if file is None:
        folder.mkdir()
    else:
        write_run(folder)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content)
    with pytest.raises(RunError, match=said):
        write_report([folder])


def test_the_command_writes_the_page_and_its_images(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    pytest.importorskip("matplotlib")
    run, page = write_run(tmp_path / "run"), tmp_path / "page.html"
    recall = [RecallRow(model="student", task="passkey", length=64, depth=d, count=4, correct=2) for d in (0.0, 1.0)]
    write_rows(run, "recall", recall, MADE)
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith("page.html")
    images = {path.stem for path in tmp_path.glob("*.png")}
    assert {"heldout", "layer-error-1", "recall-passkey-student"} <= images


@pytest.mark.parametrize(
    "low, high, log, expected",
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.0, 4.1, False, [3.0, 3.2, 3.4, 3.6, 3.8, 4.0]),
        (0.9, 1100.0, True, [1.0, 10.0, 100.0, 1000.0]),
        (8.0, 32.0, True, [10.0, 15.0, 20.0, 30.0]),
        (10.1, 10.9, True, [10.2, 10.4, 10.6, 10.8]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log=log) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("number", 0.01234, "0.0123"), ("number", 12.0, "12"), ("number", 1234.5, "1,234"), ("exact", 7.2, "7.20"),
        ("length", 4096, "4K"), ("length", 4000, "4K"), ("length", 512, "512"), ("length", 1_500, "1.5K"),
        ("bytes", 13.5e6, "13.5 MB"), ("seconds", 0.00123, "1.23 ms"), ("seconds", 2.0, "2 s"),
        ("percent", 0.25, "25 %"),
    ],
)  # fmt: skip
def test_numbers_are_short(kind: Any, value: float, expected: str) -> None:
    assert FORMATS[kind](value) == expected  # type: ignore[index]


def test_a_long_run_is_drawn_as_means_and_bad_numbers_are_not_drawn() -> None:
    points = [Point(float(n), float(n)) for n in range(1000)]
    assert len(thinned(points)) <= 160
    assert thinned(points)[0] == Point(3.0, 3.0)
    assert thinned(points[:9]) == tuple(points[:9])
    series = Series("a", (Point(1.0, float("nan")), Point(2.0, 0.0), Point(3.0, 4.0)), 0)
    chart = Lines("k", "t", "x", "y", (series, Series("none", (), 1)), log_y=True)
    assert [line.points for line in plotted(chart)] == [(Point(3.0, 4.0),)]


def test_colours_follow_the_logarithm_where_asked_and_gaps_stay_gaps() -> None:
    heat = Heat("k", "t", "x", "y", ("a", "b"), ("r",), ((10.0, None),), low=1.0, high=100.0, log=True)
    assert heat_share(heat, 10.0) == pytest.approx(0.5)
    assert heat_share(heat, 0.0) == 0.0
    drawing = draw(heat)
    assert 'class="h10"' in drawing
    assert "not measured" in drawing


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


BOXES = """[...document.querySelectorAll("svg[role=img]")].map(svg => {
  const box = svg.getBoundingClientRect(), style = getComputedStyle(svg);
  const marks = svg.querySelectorAll("polyline, rect, path, circle").length;
  return [box.width, box.height, box.left, box.right, marks, style.visibility === "visible"];
})"""
COLOURS = """["body", ".line", ".h20", "h1"].map(name => {
  const style = getComputedStyle(document.querySelector(name));
  return name === "body" ? style.backgroundColor : name === ".line" ? style.stroke : style.fill + style.color;
})"""


@pytest.mark.parametrize("compared", [False, True], ids=["single", "compared"])
def test_the_page_draws_in_a_browser(chromium: Browser, run: Path, tmp_path: Path, compared: bool) -> None:
    """No complaint, every chart there, nothing wider than the screen; on a desk and a phone, light and dark."""
    runs = [run, write_run(tmp_path / "other")] if compared else [run]
    page = write_report(runs, tmp_path / "page.html", images=False)
    colours = {}
    for dark in (False, True):
        for width in (1280, 390):
            chromium.open(page, width=width, dark=dark)
            assert chromium.complaints() == []
            boxes = chromium.evaluate(BOXES)
            assert len(boxes) >= 10
            for across, down, left, right, marks, visible in boxes:
                assert across > 200
                assert down > 60
                assert left >= 0
                assert right <= width
                assert marks
                assert visible
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        colours[dark] = chromium.evaluate(COLOURS)
    assert all(light != dark for light, dark in zip(colours[False], colours[True], strict=True))


def test_lengths_that_lie_close_share_a_number() -> None:
    lengths = [1024, 8192, 32768, 105472, 131072]
    assert measured_ticks(lengths) == [1024, 8192, 32768, 131072]
    assert measured_ticks([512, 1024, 2048]) == [512, 1024, 2048]
    assert measured_ticks([512]) == [512]
    assert measured_ticks([]) == []
