"""convert(): the whole flow, from a teacher's name to a measured student on disk.

A little over 400 lines, and convert() over 50: the flow and its parts are read together.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from linearize.caching import Targets, check_targets, targets_of
from linearize.card import model_card
from linearize.checkpoint import load_latest, restore_student, seed_all
from linearize.data import Budget, Corpus, choose_sources, heldout_from, load_corpus, scheduled_rows
from linearize.data.overlap import measure_overlap
from linearize.distributed import (
    Split,
    check_agreement,
    choose_split,
    shard_base,
    share_rows,
    sharing,
    start_processes,
)
from linearize.errors import DataError, RunError
from linearize.evals.perplexity import Autocast, perplexity
from linearize.evals.samples import PROMPT, Sampling, generate_texts
from linearize.export import export_student, load_student
from linearize.machine import Machine, Precision, choose_machine, versions
from linearize.metrics import MetricsLog, Progress
from linearize.profiling import profile_table, read_profile
from linearize.readings import Monitor
from linearize.recipe import Recipe, load_recipe
from linearize.report import write_report
from linearize.run_folder import RunFolder, share_run_folder, write_json
from linearize.stages import Stage, build_stage, check_stages, refuse_base_training, student_parameters
from linearize.stages.distil import Distil, DistilConfig
from linearize.streaming import stream_layers
from linearize.surgery import Graft, Swap, graft, plan_surgery, with_frozen_teacher
from linearize.teacher import Teacher, load_teacher
from linearize.trackers import check_trackers, track_run
from linearize.train import Batches, FitSettings, Run, check_budget, fit

POOLED = "held-out"
"""The name of text that was kept aside from the training text, over all its sources."""


EVAL_ROWS = {"cpu": 1, "cuda": 8}
"""Windows that are read at one time when perplexity is measured."""


MIXED: dict[Precision, Literal["no", "bf16"]] = {"fp32": "no", "bf16": "bf16"}
"""How training computes in a precision."""


FEW_STEPS = 100
"""A stage is not measured more often than this: on a slow machine measuring would cost more than training."""


@dataclass(frozen=True)
class Conversion:
    """What to convert, how, and where to: the options of `linearize convert`."""

    model: str
    recipe: str = "hedgehog"
    out: str | Path = "out/student"
    data: str | Sequence[str] | None = None  # each SOURCE or SOURCE=WEIGHT
    text_field: str | None = None
    heldout: str | None = None
    tokens: int | str | None = None
    overrides: Sequence[str] = ()
    device: str | None = None
    resume: bool = False
    overwrite: bool = False
    quantize: str | None = None  # the teacher's weights: 4bit or 8bit
    targets: str | Path | None = None  # folder of cached teacher targets
    compile: bool = False  # the mixers, for training: faster on a GPU that waits for its launches
    profile: bool = False  # a few steps of each stage, to run/profile
    stream_layers: bool = False  # frozen weights of a decoder layer are on the device only while it computes
    keep: int = 2  # checkpoints
    save_every: float = 120.0  # seconds, at most, between checkpoints
    split: str | None = None  # over processes: see SPLITS
    track: Sequence[str] = ()  # see TRACKERS


@dataclass(frozen=True)
class Measured:
    """A model on the held-out text: perplexity by source, and a greedy continuation of PROMPT."""

    perplexity: dict[str, float]
    sample: str


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        folder: the student, an ordinary Hugging Face folder.
        length: tokens per held-out window.
        teacher: measured before anything was changed.
        untrained: perplexities of the student before its first step.
        stages: of each stage its name, tokens, seconds, tokens per second, peak memory, and the perplexities after it.
        student: measured after it was written to disk and loaded again.
    """

    folder: Path
    length: int
    teacher: Measured
    untrained: dict[str, float]
    stages: list[dict[str, Any]]
    student: Measured


def convert(job: Conversion, console: Console | None = None) -> Converted:
    """Convert a teacher into a linear-attention student.

    Under accelerate or torchrun, every process calls this and gets the same result; the main one writes and speaks.

    Raises:
        LinearizeError: for all that the user can mend: a name, a recipe, text, a folder, a full disk, a diverged run.
        RunInterrupted: after SIGINT or SIGTERM; a checkpoint was saved.
    """
    recipe = load_recipe(job.recipe, job.overrides, job.tokens)
    for index, stage in enumerate(recipe.stages):
        check_budget(stage, index)
    if job.targets is not None:
        check_targets(recipe)
    if job.quantize is not None:
        refuse_base_training(recipe.stages)
    check_trackers(job.track)
    processes = start_processes(job.device)
    split = choose_split(job.split, recipe.stages, processes)
    console = (console or Console(stderr=True)) if processes.main else Console(quiet=True)
    with share_run_folder(processes, job.out, resume=job.resume, overwrite=job.overwrite) as folder:
        machine = _machine(job, recipe, folder)
        console.print(f"Computing on {machine.name} in {machine.precision}: {machine.why}.", highlight=False)
        stream = _check_stream(job, recipe, split)
        device = torch.device("cpu") if stream else machine.device
        teacher = load_teacher(job.model, dtype=machine.dtype, device=device, quantize=job.quantize)
        console.print(f"Teacher: {teacher.origin}. Attention: {teacher.attention}.", highlight=False)
        plan = plan_surgery(teacher.model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
        check_stages(recipe.stages, plan)
        aside = _separate_heldout(job, recipe, teacher)
        corpus = _corpus(job, recipe, teacher, aside, console)
        heldout, length = _heldout(recipe, corpus, aside)
        check_agreement(processes, "text", corpus.fingerprint)
        rows = share_rows(recipe.stages, folder.facts().get("micro_batches"), split, processes, console)
        shared = recipe.model_copy(update={"stages": rows})
        targets = _targets(job, shared, machine, teacher, corpus)
        facts = _facts(job, recipe, machine, teacher, corpus) | sharing(rows, split, processes)
        facts["overlap"] = _overlap(corpus, heldout, teacher, console)
        folder.begin(facts)

        streamed = stream_layers(teacher.model, machine.device) if stream else None
        before = Measured(**folder.once("teacher", lambda: asdict(_measure(teacher.model, teacher, heldout, length))))
        grafted = replace(_graft(teacher.model, plan, recipe, job), stream=streamed)
        second = "" if grafted.teacher is None else " Base weights will train: the teacher is a second copy."
        console.print(f"Grafted {len(plan)} student layers: {recipe.mixer.kind}.{second}", highlight=False)
        measure = partial(_student_perplexities, grafted, heldout, length)
        untrained = folder.once("untrained", measure)
        first = torch.from_numpy(next(iter(heldout.values()))[:length].astype(np.int64))[None]
        monitor = Monitor(grafted, first, partial(console.print, highlight=False, markup=False))

        def evaluate() -> dict[str, float]:
            return {**measure(), **monitor()}

        profile = folder.run / "profile" if job.profile and processes.main else None
        settings = FitSettings(
            MIXED[machine.precision], None, job.save_every, job.keep, evaluate=evaluate, profile=profile
        )
        if split == "fsdp":
            shard_base(grafted, machine.device, processes)
        training = _Training(folder, recipe, split, tuple(job.track), targets)
        stages = _train(grafted, shared, corpus, settings, training, console)

        def finish() -> Converted:
            student = _whole_student(job, recipe, teacher, folder) if split == "fsdp" else grafted
            student.leave_device()
            export_student(student, teacher.tokenizer, recipe, folder.student)
            reloaded = load_student(folder.student, device=str(machine.device))
            after = _measure(reloaded, teacher, heldout, length)
            result = Converted(folder.student, length, before, untrained, stages, after)
            _document(recipe, facts, result, folder)
            console.print(f"Report: {write_report([folder.student], images=False)}", highlight=False, soft_wrap=True)
            return result

        return processes.on_main(finish)


def _machine(job: Conversion, recipe: Recipe, folder: RunFolder) -> Machine:
    """The machine; a resumed run keeps the precision it began with, and processes have the main one's."""
    began = folder.facts().get("precision")
    machine = choose_machine(job.device, began or recipe.precision)
    precision, why = folder.processes.on_main(lambda: (machine.precision, machine.why))
    return replace(machine, precision=precision, why=why)


def _check_stream(job: Conversion, recipe: Recipe, split: Split) -> bool:
    """Whether layers are streamed.

    Raises:
        RunError: they would be, and a stage trains them, or they are quantised.
    """
    if job.stream_layers and recipe.needs_frozen_teacher:
        raise RunError(
            f"recipe {recipe.name} trains base weights; layers that train stay on the device",
            place="--stream-layers",
            remedy="Leave it out, or choose a recipe whose stages train mixers and adapters only.",
        )
    if job.stream_layers and job.quantize is not None:
        raise RunError(
            "quantised weights stay where they were quantised",
            place="--stream-layers",
            remedy="Leave it out, or leave out --quantize.",
        )
    if job.stream_layers and split == "fsdp":
        raise RunError(
            "processes that shard the layers do not keep them in host memory too",
            place="--stream-layers",
            remedy="Leave it out, or use `--split data`.",
        )
    return job.stream_layers


def _separate_heldout(job: Conversion, recipe: Recipe, teacher: Teacher) -> dict[str, np.ndarray]:
    """Held-out tokens of a text of its own, by source; empty without one."""
    if job.heldout is None:
        return {}
    return heldout_from(job.heldout, job.text_field, teacher.tokenizer, recipe.heldout_tokens)


def _corpus(
    job: Conversion, recipe: Recipe, teacher: Teacher, aside: Mapping[str, np.ndarray], console: Console
) -> Corpus:
    sources, said = choose_sources(job.data, job.text_field, recipe.data)
    console.print(said, highlight=False, markup=False)
    budget = Budget(recipe.tokens, recipe.heldout_tokens, recipe.seed, recipe.drop_overlap)
    with console.status("Reading and tokenising") as status:
        corpus = load_corpus(
            sources,
            teacher.tokenizer,
            budget,
            aside,
            progress=lambda done, total: status.update(f"Tokenising: {done:,} of {total:,}"),
            say=partial(console.print, highlight=False, markup=False),
        )
    for line in corpus.remarks():
        console.print(line, highlight=False, markup=False)
    return corpus


def _heldout(recipe: Recipe, corpus: Corpus, aside: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """Held-out tokens by source, and the length of the windows they are read in.

    Raises:
        DataError: when there is no held-out text at all.
    """
    found = aside or {POOLED: np.concatenate([np.empty(0, np.int32), *corpus.heldout.values()])}
    length = min([*(stage.length for stage in recipe.stages), max(tokens.size for tokens in found.values())])
    if length < 2:
        raise DataError(
            "leaves no text aside to measure on", place=corpus.name, remedy="Give more text, or a file with --heldout."
        )
    return {source: tokens for source, tokens in found.items() if tokens.size >= length}, length


def _targets(job: Conversion, recipe: Recipe, machine: Machine, teacher: Teacher, corpus: Corpus) -> Targets | None:
    if job.targets is None:
        return None
    return targets_of(teacher.model, recipe, corpus.fingerprint, job.targets, MIXED[machine.precision])


def cache_targets(job: Conversion, console: Console | None = None) -> None:
    """Run the teacher over the text of every stage that has `top_k`, and write its targets into `job.targets`.

    What is there already is kept. `convert` with the same job then reads them.

    Raises:
        LinearizeError: as `convert`; and where the folder holds targets of something else.
    """
    console, recipe = console or Console(stderr=True), load_recipe(job.recipe, job.overrides, job.tokens)
    for index, config in enumerate(recipe.stages):
        check_budget(config, index)
    check_targets(recipe)
    machine = choose_machine(job.device, recipe.precision)
    teacher = load_teacher(job.model, dtype=machine.dtype, device=machine.device, quantize=job.quantize)
    plan = plan_surgery(teacher.model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    check_stages(recipe.stages, plan)
    corpus = _corpus(job, recipe, teacher, _separate_heldout(job, recipe, teacher), console)
    targets = _targets(job, recipe, machine, teacher, corpus)
    assert targets is not None, "the command line asks for a folder"
    grafted = graft(teacher.model, plan)
    for index, config in enumerate(recipe.stages):
        if isinstance(config, DistilConfig):
            stage = Distil(config.model_copy(update={"lora": None}), grafted)  # the teacher has no adapters
            targets.write(stage, index, _batches(corpus, recipe, index), console)


def _overlap(corpus: Corpus, heldout: Mapping[str, np.ndarray], teacher: Teacher, console: Console) -> dict[str, float]:
    """Share of each held-out source's 13-token runs that stand in the training text; said, and noted in the run."""
    found = measure_overlap(corpus, heldout, teacher.tokenizer)
    for line in found.lines():
        console.print(line, highlight=False, markup=False)
    return {source: share.share for source, share in found.heldout.items()}


def _facts(job: Conversion, recipe: Recipe, machine: Machine, teacher: Teacher, corpus: Corpus) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run; goes to run.json and metrics.json."""
    return {
        "model": job.model,
        "teacher": {
            "name": teacher.model.config.name_or_path,
            "origin": teacher.origin,
            "revision": teacher.revision,
            "sha256": teacher.sha256,
            "license": teacher.license,
            "hub": teacher.hub,
            "languages": list(teacher.languages),
            "gated": teacher.gated,
            "attention": teacher.attention,
        },
        "recipe": recipe.name,
        "recipe_hash": recipe.digest(),
        "text": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "epochs": corpus.epochs,
            "dataset": hub_data_set(corpus.name),
        },
        "quantize": job.quantize,
        "device": machine.name,
        "precision": machine.precision,
        "seed": recipe.seed,
        "versions": versions(),
        "command": _command(job),
        "id": uuid4().hex[:12],
    }


def hub_data_set(name: str) -> str | None:
    """The Hub id in the name of a corpus (`owner/name` or `owner/name:config`); None for local text."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::[\w.-]+)?", name)
    return None if match is None or Path(name).exists() else match[1]


def _command(job: Conversion) -> str:
    """The command line that repeats this conversion."""
    words = ["linearize", "convert", "--model", job.model, "--recipe", job.recipe]
    for source in [job.data] if isinstance(job.data, str) else job.data or ():
        words += ["--data", source]
    options = {"--text-field": job.text_field, "--heldout": job.heldout, "--tokens": job.tokens}
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    for override in job.overrides:
        words += ["--set", override]
    words += [] if job.quantize is None else ["--quantize", job.quantize]
    words += [] if job.targets is None else ["--targets", str(job.targets)]
    words += ["--compile"] if job.compile else []
    words += ["--stream-layers"] if job.stream_layers else []
    return shlex.join([*words, "--out", str(job.out)])


def _graft(model: PreTrainedModel, plan: tuple[Swap, ...], recipe: Recipe, job: Conversion) -> Graft:
    """The graft, with what its recipe's stages and this job ask of it."""
    seed_all(recipe.seed, len(recipe.stages))  # mixers that start at random start the same in every run
    grafted = graft(model, plan)
    if recipe.needs_frozen_teacher:
        grafted = with_frozen_teacher(grafted)
    if job.compile:
        grafted.compile_mixers()
    return grafted


@dataclass(frozen=True)
class _Training:
    """Where a run is written and followed, how its work is shared, and what of the teacher was cached.

    `recipe` is the one that was asked for.
    """

    folder: RunFolder
    recipe: Recipe
    split: Split
    track: tuple[str, ...]
    targets: Targets | None


def _train(
    grafted: Graft,
    recipe: Recipe,
    corpus: Corpus,
    settings: FitSettings,
    training: _Training,
    console: Console,
) -> list[dict[str, Any]]:
    """Run every stage, or what is left of them; what each came to."""
    folder = training.folder
    checkpoint = folder.processes.on_main(lambda: load_latest(folder.run))
    first = 0 if checkpoint is None else checkpoint.state.stage_index
    built: list[Stage] = []
    with (
        track_run(training.track, folder, training.recipe, checkpoint) as log,
        MetricsLog(folder.run / "metrics.jsonl", also=log) as metrics,
    ):
        for index, config in enumerate(recipe.stages):
            stage = _build_stage(recipe, index, grafted)
            built.append(stage)
            if index < first:
                continue
            grafted.model.requires_grad_(False)
            run = Run(
                out=folder.run,
                stage_index=index,
                student=student_parameters(grafted, built),
                checkpoint=checkpoint if index == first else None,
                metrics=metrics,
                progress=Progress(console),
                seed=recipe.seed,
                recipe_hash=training.recipe.digest(),
                corpus_fingerprint=corpus.fingerprint,
                processes=folder.processes,
                split=training.split,
            )
            batches = _batches(corpus, recipe, index)
            if training.targets is not None:
                batches = training.targets.read(stage, index, batches)
            every = max(FEW_STEPS, config.steps // recipe.evaluations)
            result = fit(stage, batches, run, replace(settings, eval_every_steps=every))
            folder.record(f"stage{index}", {"name": stage.name, **asdict(result)})
            if settings.profile is not None:
                console.print(profile_table(stage.name, read_profile(settings.profile, f"stage{index}")))
    grafted.model.requires_grad_(False)
    return [folder.results()[f"stage{index}"] for index in range(len(recipe.stages))]


def _build_stage(recipe: Recipe, index: int, grafted: Graft) -> Stage:
    seed_all(recipe.seed, len(recipe.stages) + 1 + index)  # adapters that start at random, like mixers
    return build_stage(recipe.stages[index], grafted)


def _whole_student(job: Conversion, recipe: Recipe, teacher: Teacher, folder: RunFolder) -> Graft:
    """The trained student with all of its weights here, where they were sharded.

    Base weights stayed frozen: they are the teacher's, and all else is in the last checkpoint.
    """
    again = load_teacher(job.model, dtype=teacher.model.dtype, device=teacher.model.device)
    plan = plan_surgery(again.model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    grafted = _graft(again.model, plan, recipe, job)
    stages = [_build_stage(recipe, index, grafted) for index in range(len(recipe.stages))]
    checkpoint = load_latest(folder.run)
    assert checkpoint is not None
    restore_student(checkpoint, student_parameters(grafted, stages))
    return grafted


def _batches(corpus: Corpus, recipe: Recipe, index: int) -> Batches:
    """The part of the corpus that stage number `index` reads; no two stages read the same tokens."""
    first_token = sum(stage.tokens for stage in recipe.stages[:index])
    return scheduled_rows(corpus, recipe.stages[index], first_token, recipe.seed + index)


def _student_perplexities(grafted: Graft, heldout: Mapping[str, np.ndarray], length: int) -> dict[str, float]:
    """Perplexity by source during training: base weights that train are fp32 then, and run under autocast."""
    mixed = partial(torch.autocast, grafted.model.device.type, torch.bfloat16, enabled=bool(grafted.raised))
    return _perplexities(grafted.model, heldout, length, mixed)


def _perplexities(
    model: PreTrainedModel, heldout: Mapping[str, np.ndarray], length: int, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Perplexity by source."""
    rows = EVAL_ROWS[model.device.type]

    def measure(tokens: np.ndarray) -> float:
        found = perplexity(model, tokens, length=length, max_tokens=tokens.size, batch_rows=rows, autocast=autocast)
        return found.perplexity

    return {source: measure(tokens) for source, tokens in heldout.items()}


def _measure(model: PreTrainedModel, teacher: Teacher, heldout: Mapping[str, np.ndarray], length: int) -> Measured:
    (sample,) = generate_texts(model, teacher.tokenizer, [PROMPT], Sampling())
    return Measured(_perplexities(model, heldout, length), sample)


def _document(recipe: Recipe, facts: dict[str, Any], result: Converted, folder: RunFolder) -> None:
    """Write metrics.json and the model card beside the weights."""
    before, after = result.teacher.perplexity, result.student.perplexity
    table = [
        {
            "source": source,
            "length": result.length,
            "teacher": before[source],
            "student": after[source],
            "ratio": after[source] / before[source],
        }
        for source in before
    ]
    metrics = {
        **facts,
        "perplexity": table,
        "untrained": result.untrained,
        "stages": result.stages,
        "samples": {"prompt": PROMPT, "teacher": result.teacher.sample, "student": result.student.sample},
    }
    write_json(folder.student / "metrics.json", metrics)
    (folder.student / "README.md").write_text(model_card(recipe, metrics), encoding="utf-8")
