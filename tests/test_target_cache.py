"""Teacher targets on disk: what they are tied to, how damage is found, and that training on them is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from linearize import packed, target_cache
from linearize.caching import Targets
from linearize.cli import main
from linearize.errors import RecipeError, RunError
from linearize.job import Conversion
from linearize.metrics import TIMING_FIELDS, read_metrics
from linearize.pipeline import cache_targets, convert
from linearize.recipe import load_recipe
from linearize.stages import Batch
from linearize.stages.distil import Distil
from linearize.target_cache import TargetKey, open_targets, teacher_digest, write_targets
from linearize.topk import TopK

KEY = TargetKey(
    teacher="t", text="x", packing=(0, 64, 0, (5, 4, 2)), micro_batches=5, top_k=3, temperature=1.0, precision="no"
)


def batches(seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    place_BT = torch.arange(4).expand(2, 4)
    found = []
    for _ in range(5):
        ids_BT = torch.randint(97, (2, 4), generator=generator)
        found.append(Batch(ids_BT, place_BT, None, torch.ones(2, 4, dtype=torch.bool)))
    return found


def answer(batch: Batch) -> TopK:
    values = batch.input_ids_BT[..., None] * torch.tensor([1.0, 0.5, 0.1])
    return TopK(values, torch.arange(3).expand(2, 4, 3).to(torch.uint16), values.sum(-1))


def write(folder: Path, key: TargetKey = KEY, answer: Any = answer) -> int:
    return write_targets(folder, key, batches(), answer, lambda done, of: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_cache, "SHARD_BYTES", 400)  # 176 bytes a micro-batch here: two a shard


def test_what_is_written_is_read(tmp_path):
    assert write(tmp_path) == 5
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    rows = open_targets(tmp_path, KEY, batches())
    assert len(rows) == 5
    for index, batch in enumerate(batches()):
        teacher = rows[index].teacher
        assert teacher is not None
        assert all(map(torch.equal, teacher, answer(batch)))
        assert rows[index].to("cpu").teacher is not None


def test_a_killed_writer_goes_on_with_the_same_files(tmp_path):
    whole, parts, calls = tmp_path / "whole", tmp_path / "parts", 0
    write(whole)

    def dies(batch: Batch) -> TopK:
        nonlocal calls
        calls += 1
        if calls == 5:  # one is asked to learn the size
            raise KeyboardInterrupt
        return answer(batch)

    with pytest.raises(KeyboardInterrupt):
        write(parts, answer=dies)
    with pytest.raises(RunError, match="targets-00001.safetensors is missing.*cache-targets"):
        open_targets(parts, KEY, batches())
    assert write(parts) == 3
    assert write(parts) == 0
    for path in whole.glob("targets-*"):
        assert path.read_bytes() == (parts / path.name).read_bytes()


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:-3]
    elif how == "altered":
        content[-5] ^= 1
    path.write_bytes(content) if how != "lost" else path.unlink()


@pytest.mark.parametrize(
    "how, said", [("truncated", r"has \d+ bytes instead of"), ("altered", "was altered"), ("lost", "missing")]
)
def test_damage_is_found_and_mended(tmp_path, how, said):
    write(tmp_path)
    damaged(tmp_path / "targets-00001.safetensors", how)
    with pytest.raises(RunError, match=f"targets-00001.safetensors.*{said}"):
        open_targets(tmp_path, KEY, batches())
    assert write(tmp_path) == 2
    assert len(open_targets(tmp_path, KEY, batches())) == 5


@pytest.mark.parametrize(
    "change", [{"teacher": "u"}, {"text": "y"}, {"top_k": 4}, {"temperature": 2.0}, {"packing": (0, 64, 1, (5, 4, 2))}]
)
def test_targets_of_something_else_are_refused(tmp_path, change):
    write(tmp_path)
    other = KEY.model_copy(update=change)
    (name,) = change
    for use in (lambda: open_targets(tmp_path, other, batches()), lambda: write(tmp_path, other)):
        with pytest.raises(RunError, match=rf"another {name} \(cached .*, asked "):
            use()


def test_targets_of_other_tokens_are_noticed(tmp_path):
    """As when rows are packed in another way by another version, and the key does not know."""
    write(tmp_path)
    with pytest.raises(RunError, match="micro-batch 0 belong to other tokens"):
        open_targets(tmp_path, KEY, batches(seed=1))[0]


def test_folders_that_hold_no_cache(tmp_path):
    with pytest.raises(RunError, match="holds no cached targets"):
        open_targets(tmp_path, KEY, batches())
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="is no manifest of cached targets"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "file" / "cache")


def test_any_weight_changes_the_teachers_digest(make_teacher):
    teacher = make_teacher()
    before = teacher_digest(teacher)
    assert before == teacher_digest(make_teacher())
    teacher.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert teacher_digest(teacher) != before


def test_so_does_how_it_turns_positions(make_teacher):
    """Same weights, other logits: a cache of the one must not teach as the other."""
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    before, after = make_teacher(), make_teacher(rope_parameters=scaled)
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    assert teacher_digest(before) != teacher_digest(after)


SHORT = (
    "stages.0.length=32",
    "stages.0.batch=2",
    "stages.0.micro_batch=1",
    "stages.0.tokens=128",
    "stages.1.lengths=[[0.5, 16], [0.5, 32]]",
    "stages.1.batch=2",
    "stages.1.micro_batch=1",
    "stages.1.tokens=640",
    "heldout_tokens=256",
    "precision=fp32",
)


@pytest.fixture(scope="module")
def job(teacher_folder, tmp_path_factory) -> Conversion:
    text = tmp_path_factory.mktemp("job") / "text.txt"
    text.write_text("\n\n".join(f"{n} lines of plain text are here, and {n * n} words." for n in range(200)))
    return Conversion(str(teacher_folder), "hedgehog", data=str(text), overrides=SHORT)


def losses(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_metrics(out)]


QUIET = Console(quiet=True)


@pytest.mark.parametrize("by_document", [False, True])
def test_a_run_on_cached_targets_is_the_run_that_asks_the_teacher(job, tmp_path, monkeypatch, by_document):
    monkeypatch.setattr(packed, "_able", lambda *_: by_document)  # as on a GPU
    monkeypatch.setattr(packed, "SHORTEST", 0)
    asks = replace(job, overrides=(*SHORT, "stages.1.top_k=9"), out=tmp_path / "asks")
    convert(asks, QUIET)
    reads = replace(asks, out=tmp_path / "reads", targets=tmp_path / "targets")
    cache_targets(reads, QUIET)
    monkeypatch.setattr(Distil, "targets", lambda *arguments: pytest.fail("the teacher was asked"))
    convert(reads, QUIET)
    found = [losses(folder / "run" / "metrics.jsonl") for folder in (tmp_path / "asks", tmp_path / "reads")]
    assert found[0] == found[1]
    other = replace(reads, overrides=(*reads.overrides, "seed=5"), out=tmp_path / "other")
    with pytest.raises(RunError, match=r"targets/stage1: .*another text .*another packing"):
        convert(other, QUIET)


def test_the_whole_vocabulary_teaches_what_the_teacher_itself_does(job, tmp_path):
    convert(replace(job, out=tmp_path / "plain"), QUIET)
    convert(replace(job, out=tmp_path / "all", overrides=(*SHORT, "stages.1.top_k=257")), QUIET)
    one, two = (losses(tmp_path / name / "run" / "metrics.jsonl") for name in ("plain", "all"))
    for was, now in zip(one, two, strict=True):
        assert now["loss"] == pytest.approx(was["loss"], rel=1e-4)


def test_caches_of_all_stages_can_be_checked_before_the_first(job, tmp_path):
    """Else a conversion would find out after hours of its first stage."""
    recipe = load_recipe("hedgehog", (*SHORT, "stages.1.top_k=4"))
    made = replace(job, overrides=(*SHORT, "stages.1.top_k=4"), targets=tmp_path)
    cache_targets(made, QUIET)
    manifest = json.loads((tmp_path / "stage1" / "manifest.json").read_text())
    targets = Targets(tmp_path, recipe, manifest["key"]["teacher"], manifest["key"]["text"], "no")
    targets.check()
    other_rows = recipe.stages[1].model_copy(update={"micro_batch": 2})  # as a share of a step's rows may be
    shared = recipe.model_copy(update={"stages": (recipe.stages[0], other_rows)})
    with pytest.raises(
        RunError, match=r"another packing .* and another micro_batches .* cache with that `micro_batch`"
    ):
        replace(targets, recipe=shared).check()
    with pytest.raises(RunError, match="holds no cached targets"):
        replace(targets, folder=tmp_path / "elsewhere").check()


def test_the_command_takes_what_decides_on_the_text(job, tmp_path, monkeypatch):
    """Two sources and held-out text of its own: else no conversion with them could read a cache."""
    more, aside = tmp_path / "more.txt", tmp_path / "aside.txt"
    more.write_text("\n\n".join(f"{n} other lines." for n in range(300)))
    aside.write_text("Nothing of this is trained on. " * 40)
    words = ["--data", f"{job.data}=3", "--data", f"{more}=1", "--heldout", str(aside), "--drop-overlap", "0.9"]
    words += ["-m", job.model, "--targets", str(tmp_path / "cache"), "--device", "cpu"]
    words += [word for value in (*SHORT, "stages.1.top_k=4") for word in ("--set", value)]
    for command in (["cache-targets"], ["convert", "--out", str(tmp_path / "out")]):
        monkeypatch.setattr("sys.argv", ["linearize", *command, *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code in (0, None)


def test_what_cannot_be_cached_is_said(job, tmp_path, capsys, monkeypatch):
    with pytest.raises(RecipeError, match=r"--targets: no stage learns from cached targets.*top_k=64"):
        convert(replace(job, out=tmp_path / "out", targets=tmp_path), QUIET)
    wide = replace(job, overrides=(*SHORT, "stages.1.top_k=258"), targets=tmp_path / "t")
    with pytest.raises(RecipeError, match="258 is more than the vocabulary of 257 has"):
        cache_targets(wide, QUIET)
    words = ["cache-targets", "-m", job.model, "--data", str(job.data), "--targets", str(tmp_path / "cli")]
    words += [word for value in (*SHORT, "stages.1.top_k=4") for word in ("--set", value)]
    monkeypatch.setattr("sys.argv", ["linearize", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert list((tmp_path / "cli" / "stage1").glob("targets-*.safetensors"))
