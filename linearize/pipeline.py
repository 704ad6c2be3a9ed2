"""convert(): the whole flow, from a teacher's name to a measured student on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from linearize.caching import Targets, check_targets, targets_of
from linearize.checkpoint import load_latest, restore_student
from linearize.data import Corpus
from linearize.distributed import Split, check_agreement, choose_split, share_rows, sharing, start_processes
from linearize.errors import SurgeryError, TeacherError
from linearize.export import export_student, load_student
from linearize.faults import told
from linearize.fingerprint import fingerprint_of, pinned
from linearize.graphs import obstacle
from linearize.job import Conversion, check_budgets, check_job, check_text
from linearize.machine import Machine, choose_machine
from linearize.measuring import Converted, Measured, evaluation, measure, measure_in_training
from linearize.metrics import MetricsLog, Progress
from linearize.packed import softmax_by_document
from linearize.profiling import profile_table, read_profile
from linearize.provenance import asked, document, facts_of
from linearize.randomness import seed_all
from linearize.recipe import Recipe, load_recipe
from linearize.run_folder import RunFolder, share_run_folder
from linearize.sharding import free_weights, load_sharded_student, load_sharded_teacher
from linearize.stages import Stage, build_stage, check_graft, check_sizes, check_stages, student_parameters
from linearize.stages.distil import Distil, DistilConfig
from linearize.streaming import stream_layers
from linearize.surgery import Graft, Swap, graft, plan_surgery, with_frozen_teacher
from linearize.teacher import Teacher, load_teacher
from linearize.teacher_files import Checkpoint, find_checkpoint
from linearize.text import Heldout, batches_of, choose_heldout, read_text, say_overlap
from linearize.trackers import track_run
from linearize.train import FitSettings, Run, fit

FEW_STEPS = 100
"""A stage is not measured more often than this: on a slow machine measuring would cost more than training."""


def convert(job: Conversion, console: Console | None = None) -> Converted:
    """Convert a teacher into a linear-attention student.

    Under accelerate or torchrun, every process calls this and gets the same result; the main one writes and speaks.

    Raises:
        LinearizeError: for all that the user can mend: a name, a recipe, text, a folder, a full disk, a diverged run.
        RunInterrupted: after SIGINT or SIGTERM; a checkpoint was saved.
    """
    recipe = load_recipe(job.recipe, job.overrides, job.tokens)
    processes = start_processes(job.device)
    split = choose_split(job.split, recipe.stages, processes)
    check_job(job, recipe, split)
    console = (console or Console(stderr=True)) if processes.main else Console(quiet=True)
    with (
        told(processes.rank, processes.count),
        share_run_folder(processes, job.out, resume=job.resume, overwrite=job.overwrite) as folder,
    ):
        folder.check_same(asked(job, recipe))
        machine = _choose_machine(job, recipe, folder, console)
        checkpoint, weights = _find_teacher(job, split, folder, console)
        teacher = _load_teacher(job, checkpoint, machine, split, folder, console)
        plan = _plan(teacher.model, recipe)
        corpus, aside = read_text(job, recipe, teacher.tokenizer, console)
        heldout = choose_heldout(recipe, corpus, aside)
        check_agreement(processes, "text", corpus.fingerprint)
        rows = share_rows(recipe.stages, folder.facts().get("micro_batches"), split, processes, console)
        shared = recipe.model_copy(update={"stages": rows})
        targets = _checked(_targets(job, shared, machine, teacher, corpus))
        facts = facts_of(job, recipe, machine, teacher, corpus) | sharing(rows, split, processes)
        facts |= {"weights": weights, "overlap": say_overlap(corpus, heldout, teacher.tokenizer, console)}
        folder = folder.begin(facts)
        streamed = stream_layers(teacher.model, machine.device) if job.stream_layers else None
        together = split == "fsdp"
        before = folder.once("teacher", lambda: asdict(measure(teacher.model, teacher.tokenizer, heldout)), together)
        _refuse_broken(teacher, before["perplexity"])
        grafted = replace(_graft(teacher.model, plan, recipe, job.compile), stream=streamed)
        check_graft(recipe.stages, grafted)
        second = "" if grafted.teacher is None else " Base weights will train: the teacher is a second copy."
        console.print(f"Grafted {len(plan)} student layers: {recipe.mixer.kind}.{second}", highlight=False)
        untrained = folder.once("untrained", partial(measure_in_training, grafted, heldout), together)
        evaluate = evaluation(grafted, heldout, partial(console.print, highlight=False, markup=False))
        training = _Training(job, recipe, shared, split, folder, machine, corpus, targets, console)
        stages = _train(grafted, training, evaluate)
        after = _export(grafted, teacher, checkpoint, heldout, training)

        def finish() -> Converted:
            result = Converted(folder.student, heldout.length, Measured(**before), untrained, stages, after)
            console.print(f"Report: {document(recipe, facts, result)}", highlight=False, soft_wrap=True)
            return result

        return processes.on_main(finish)


def cache_targets(job: Conversion, console: Console | None = None) -> None:
    """Run the teacher over the text of every stage that has `top_k`, and write its targets into `job.targets`.

    What is there already is kept. `convert` with the same job then reads them.

    Raises:
        LinearizeError: as `convert`; and where the folder holds targets of something else.
    """
    console, recipe = console or Console(stderr=True), load_recipe(job.recipe, job.overrides, job.tokens)
    check_budgets(recipe)
    check_targets(recipe)
    check_text(job, recipe)
    machine = choose_machine(job.device, recipe.precision)
    teacher = load_teacher(job.model, dtype=machine.dtype, device=machine.device, quantize=job.quantize)
    plan = _plan(teacher.model, recipe)
    corpus, _ = read_text(job, recipe, teacher.tokenizer, console)
    targets = _targets(job, recipe, machine, teacher, corpus)
    assert targets is not None, "the command line asks for a folder"
    grafted = graft(teacher.model, plan)
    for index, config in enumerate(recipe.stages):
        if isinstance(config, DistilConfig):
            stage = Distil(config.model_copy(update={"lora": None}), grafted)  # the teacher has no adapters
            targets.write(stage, index, batches_of(corpus, recipe, index), console)


def _choose_machine(job: Conversion, recipe: Recipe, folder: RunFolder, console: Console) -> Machine:
    """The machine; a resumed run keeps the precision it began with, and processes have the main one's."""
    began = folder.facts().get("precision")
    machine = choose_machine(job.device, began or recipe.precision)
    precision, why = folder.processes.on_main(lambda: (machine.precision, machine.why))
    console.print(f"Computing on {machine.name} in {precision}: {why}.", highlight=False)
    return replace(machine, precision=precision, why=why)


def _find_teacher(job: Conversion, split: Split, folder: RunFolder, console: Console) -> tuple[Checkpoint, str]:
    """The teacher's files, and their fingerprint: all who read them must have it, and what the run began with."""
    model = pinned(job.model, folder.facts().get("teacher", {}))
    if model != job.model:
        console.print(f"Going on with {model}, the teacher that this run began with.", highlight=False)

    def find() -> tuple[Checkpoint, str]:
        checkpoint = find_checkpoint(model)
        return checkpoint, fingerprint_of(checkpoint)

    checkpoint, weights = folder.processes.on_main(find) if split == "fsdp" else find()
    check_agreement(folder.processes, "weights of the teacher", weights)
    folder.check_weights(weights, checkpoint.origin)
    return checkpoint, weights


def _load_teacher(
    job: Conversion, checkpoint: Checkpoint, machine: Machine, split: Split, folder: RunFolder, console: Console
) -> Teacher:
    """The teacher, where it computes; in host memory where its layers will be streamed."""
    if split == "fsdp":
        teacher = load_sharded_teacher(checkpoint, machine.dtype, machine.device, folder.processes)
    else:
        device = torch.device("cpu") if job.stream_layers else machine.device
        teacher = load_teacher(checkpoint, dtype=machine.dtype, device=device, quantize=job.quantize)
    console.print(f"Teacher: {teacher.origin}. Attention: {teacher.attention}.", highlight=False)
    return teacher


def _refuse_broken(teacher: Teacher, perplexity: dict[str, float]) -> None:
    """Refuse a teacher that nothing can be learnt from, and say that it is the teacher."""
    broken = [f"{found} on {source}" for source, found in perplexity.items() if not math.isfinite(found)]
    if broken:
        raise TeacherError(
            f"its perplexity is {', '.join(broken)}: its weights are broken, or overflow in {teacher.model.dtype}.",
            place=teacher.origin,
            remedy="Look with `linearize doctor`; `--set precision=fp32` where only the precision is at fault.",
        )


def _plan(model: PreTrainedModel, recipe: Recipe) -> tuple[Swap, ...]:
    """The surgery; it and the recipe's stages fit the model."""
    plan = plan_surgery(model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    if not plan:
        raise SurgeryError("leaves no layer to replace", place="keep_softmax", remedy="Take layers out of it.")
    check_stages(recipe.stages, plan)
    check_sizes(recipe.stages, model)
    return plan


def _checked(targets: Targets | None) -> Targets | None:
    """Targets that are about to be read: a wrong cache is found before anything trains."""
    if targets is not None:
        targets.check()
    return targets


def _targets(job: Conversion, recipe: Recipe, machine: Machine, teacher: Teacher, corpus: Corpus) -> Targets | None:
    if job.targets is None:
        return None
    return targets_of(teacher.model, recipe, corpus.fingerprint, job.targets, machine.mixed_precision)


def _graft(model: PreTrainedModel, plan: tuple[Swap, ...], recipe: Recipe, compiled: bool) -> Graft:
    """The graft, with what its recipe's stages and this job ask of it."""
    seed_all(recipe.seed, len(recipe.stages))  # mixers that start at random start the same in every run
    grafted = graft(model, plan)
    if recipe.needs_frozen_teacher:
        grafted = with_frozen_teacher(grafted)
    if compiled:
        grafted.compile_mixers()
    return grafted


@dataclass(frozen=True)
class _Training:
    """What the stages of a conversion have in common, but for the student."""

    job: Conversion
    recipe: Recipe  # as it was asked for: a resumed run must have the same
    shared: Recipe  # with micro-batches that the processes can share
    split: Split
    folder: RunFolder
    machine: Machine
    corpus: Corpus
    targets: Targets | None  # what of the teacher was cached
    console: Console


def _train(grafted: Graft, training: _Training, evaluate: Callable[[], dict[str, float]]) -> list[dict[str, Any]]:
    """Run every stage, or what is left of them; what each came to."""
    folder, recipe = training.folder, training.shared
    checkpoint = folder.processes.on_main(lambda: load_latest(folder.run))
    first = 0 if checkpoint is None else checkpoint.state.stage_index
    built: list[Stage] = []
    with (
        track_run(training.job.track, folder, training.recipe, checkpoint) as log,
        MetricsLog(folder.run / "metrics.jsonl", also=log) as metrics,
    ):
        for index in range(len(recipe.stages)):
            built.append(_build_stage(recipe, index, grafted))
            if index < first:
                continue
            grafted.model.requires_grad_(False)
            run = Run(
                out=folder.run,
                stage_index=index,
                student=student_parameters(grafted, built),
                checkpoint=checkpoint if index == first else None,
                metrics=metrics,
                progress=Progress(training.console),
                seed=recipe.seed,
                recipe_hash=training.recipe.digest(),
                corpus_fingerprint=training.corpus.fingerprint,
                processes=folder.processes,
                split=training.split,
            )
            graphs = training.job.graphs and _recordable(recipe, index, grafted, training)
            with softmax_by_document(grafted, training.machine.mixed_precision) as by_document:
                _train_stage(built[-1], run, training, evaluate, graphs, by_document)
    grafted.model.requires_grad_(False)
    return [folder.results()[f"stage{index}"] for index in range(len(recipe.stages))]


def _recordable(recipe: Recipe, index: int, grafted: Graft, training: _Training) -> bool:
    """Whether the stage's micro-batches can be recorded as CUDA graphs; says why not, where there is a GPU for them."""
    why = obstacle(recipe.stages[index], grafted)
    if not why and training.split != "data":
        why = "what other processes do within a step cannot be recorded"
    if not why and training.job.profile:
        why = "a profile wants to see the parts of a step"
    if why and training.machine.device.type == "cuda":
        training.console.print(f"Stage {index} runs without CUDA graphs: {why}.", highlight=False, markup=False)
    return not why


def _train_stage(
    stage: Stage,
    run: Run,
    training: _Training,
    evaluate: Callable[[], dict[str, float]],
    graphs: bool,
    by_document: bool,
) -> None:
    """Run one stage, and note what it came to."""
    job, index = training.job, run.stage_index
    batches = batches_of(training.corpus, training.shared, index)
    if training.targets is not None:
        batches = training.targets.read(stage, index, batches)
    settings = FitSettings(
        mixed_precision=training.machine.mixed_precision,
        save_every_seconds=job.save_every,
        keep=job.keep,
        evaluate=evaluate,
        eval_every_steps=max(FEW_STEPS, stage.config.steps // training.recipe.evaluations),
        graphs=graphs,
        by_document=by_document,
        profile=run.out / "profile" if job.profile and run.processes.main else None,
    )
    result = fit(stage, batches, run, settings)
    training.folder.record(f"stage{index}", {"name": stage.name, **asdict(result)})
    if settings.profile is not None:
        training.console.print(profile_table(stage.name, read_profile(settings.profile, f"stage{index}")))


def _build_stage(recipe: Recipe, index: int, grafted: Graft) -> Stage:
    seed_all(recipe.seed, len(recipe.stages) + 1 + index)  # adapters that start at random, like mixers
    return build_stage(recipe.stages[index], grafted)


def _export(
    grafted: Graft, teacher: Teacher, checkpoint: Checkpoint, heldout: Heldout, training: _Training
) -> Measured:
    """Write the student, load what was written, and measure that.

    A sharded student is put together in host memory to be written. What was written is then sharded in its place, and
    measured by all processes.
    """
    folder, recipe, device = training.folder, training.recipe, training.machine.device
    sharded = training.split == "fsdp"

    def write() -> None:
        student = _whole_student(checkpoint, recipe, teacher, folder) if sharded else grafted
        student.leave_device()
        export_student(student, teacher.tokenizer, recipe, folder.student)

    def measure_written() -> Measured:
        return measure(load_student(folder.student, device=str(device)), teacher.tokenizer, heldout)

    folder.processes.on_main(write)
    if not sharded:
        return folder.processes.on_main(measure_written)
    free_weights(grafted.model)
    return measure(load_sharded_student(folder.student, device, folder.processes), teacher.tokenizer, heldout)


def _whole_student(checkpoint: Checkpoint, recipe: Recipe, teacher: Teacher, folder: RunFolder) -> Graft:
    """The trained student with all of its weights in host memory, where they were sharded over devices.

    Base weights stayed frozen: they are the teacher's, and all else is in the last checkpoint.
    """
    again = load_teacher(checkpoint, dtype=teacher.model.dtype)
    plan = plan_surgery(again.model, recipe.mixer, recipe.keep_softmax, recipe.replace_sliding)
    grafted = _graft(again.model, plan, recipe, compiled=False)
    stages = [_build_stage(recipe, index, grafted) for index in range(len(recipe.stages))]
    trained = load_latest(folder.run)
    assert trained is not None
    restore_student(trained, student_parameters(grafted, stages))
    return grafted
