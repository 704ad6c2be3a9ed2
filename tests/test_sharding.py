"""Models that processes share from the start: each has its part of the weights and never more, and together they are
the model that one process would have loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_processes import QUIET, SETTINGS, assert_same, together
from tiny_families import tiny_teacher
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize.adapters import LoraSettings, add_lora
from linearize.distributed import Processes, is_sharded
from linearize.errors import MainFailed, TeacherError
from linearize.evals.samples import Sampling, generate_texts
from linearize.export import export_student, load_student
from linearize.families import FAMILIES
from linearize.job import Conversion
from linearize.pipeline import convert
from linearize.recipe import load_recipe
from linearize.sharding import free_weights, load_sharded_student, load_sharded_teacher, needless, without_weights
from linearize.surgery import decoder_layers, graft, plan_surgery
from linearize.target_cache import teacher_digest
from linearize.teacher import load_teacher, load_tokenizer
from tests.tiny_llama import write_gguf, write_gpt2_gguf

CPU = torch.device("cpu")
SMALL = 2**16
"""Bytes of what is sent beside weights: the model without them, names, shapes."""


class Held(TorchDispatchMode):
    """Bytes of the living tensors that operations made inside, and the most there were at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                self.storages.add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result


def joined(rank: int, count: int = 2) -> Processes:
    dist.init_process_group("gloo")
    return Processes(rank, count, dist.new_group(backend="gloo"))


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def assert_same_model(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Weights, dtypes, ties, buffers and settings; and the same logits."""
    parameters, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert (found.dtype, parameter.requires_grad) == (expected[name].dtype, False), name
        assert torch.equal(found, expected[name]), name
    buffers, expected_buffers = dict(model.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected_buffers[name]), name
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)


def tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.fixture(scope="module")
def folder_of(tokenizer, tmp_path_factory) -> Callable[..., str]:
    """A function that writes a tiny teacher of a family with its tokenizer."""

    def write(family: str, **overrides: Any) -> str:
        folder = tmp_path_factory.mktemp(family)
        tiny_teacher(family, **overrides).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


def test_processes_share_the_teacher_of_every_family(folder_of):
    folders = {family: folder_of(family) for family in FAMILIES}
    folders["llama, tied"] = folder_of("llama", tie_word_embeddings=True)

    def run(rank: int) -> None:
        processes = joined(rank)
        found = Counter()
        for name, folder in folders.items():
            teacher, alone = load_sharded_teacher(folder, torch.float32, CPU, processes), load_teacher(folder)
            assert is_sharded(teacher.model)
            assert teacher.origin == alone.origin
            assert teacher.attention == alone.attention
            assert tied(teacher.model) == tied(alone.model)
            found[tied(alone.model)] += 1
            sharded = {p for p in teacher.model.parameters() if isinstance(p, DTensor)}
            assert sharded == set(decoder_layers(teacher.model).parameters()), name
            assert_same_model(teacher.model, alone.model)
            assert teacher_digest(teacher.model) == teacher_digest(alone.model)
        assert min(found[True], found[False]) > 1

    assert together(2, run) == [0, 0]


def test_a_process_may_have_no_part_of_a_weight(folder_of):
    """Four experts over five processes, and rows that five does not divide."""
    folder = folder_of("mixtral")

    def run(rank: int) -> None:
        model, alone = load_sharded_teacher(folder, torch.float32, CPU, joined(rank, 5)).model, load_teacher(folder)
        assert (rank < 4) == all(p.to_local().numel() for p in decoder_layers(model).parameters())
        assert_same_model(model, alone.model)
        assert teacher_digest(model) == teacher_digest(alone.model)
        free_weights(model)

    assert together(5, run) == [0] * 5


def test_no_process_but_the_main_one_reads_weights_or_holds_them_all(folder_of):
    folder = folder_of("llama", num_hidden_layers=8)
    whole = nbytes(load_teacher(folder).model.parameters())

    def run(rank: int) -> None:
        processes = joined(rank)
        if rank == 1:
            AutoModelForCausalLM.from_pretrained = None  # type: ignore[method-assign, assignment]  # in this fork
        with Held() as held:
            model = load_sharded_teacher(folder, torch.float32, CPU, processes).model
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        largest = max(nbytes([parameter]) for parameter in model.parameters())
        assert nbytes(local) < 0.6 * whole
        assert held.now < nbytes([*local, *model.buffers()]) + SMALL  # also where the main process read it all
        if rank == 1:
            assert nbytes(local) < held.most < nbytes([*local, *model.buffers()]) + largest + SMALL < 0.75 * whole
        teacher_digest(model)  # reads them all, and lays hold of none
        free_weights(model)
        assert held.now < SMALL

    assert together(2, run) == [0, 0]


def test_dtypes_and_files_are_those_of_one_process(tmp_path, folder_of):
    """GGUF files that are unpacked into bf16; a folder in fp32 that is read in bf16."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    turned = tmp_path / "gpt2.gguf"
    write_gpt2_gguf(turned)
    names = str(file), str(turned), folder_of("gemma2")

    def run(rank: int) -> None:
        processes = joined(rank)
        for name in names:
            teacher = load_sharded_teacher(name, torch.bfloat16, CPU, processes)
            alone = load_teacher(name, dtype=torch.bfloat16)
            assert (teacher.sha256, teacher.origin) == (alone.sha256, alone.origin)
            assert_same_model(teacher.model, alone.model)

    assert together(2, run) == [0, 0]


def test_processes_share_a_student_that_was_written(folder_of, tmp_path):
    """One with adapters merged and a layer that kept its softmax; it answers like the whole one, together."""
    folder, out = folder_of("llama"), tmp_path / "student"
    teacher = load_teacher(folder)
    recipe = load_recipe("hedgehog", ["keep_softmax=[1]"])
    grafted = graft(teacher.model, plan_surgery(teacher.model, recipe.mixer, (1,)))
    add_lora(teacher.model, LoraSettings())
    export_student(grafted, teacher.tokenizer, recipe, out)

    def run(rank: int) -> None:
        processes = joined(rank)
        student, alone = load_sharded_student(out, CPU, processes), load_student(out)
        assert not [name for name, p in student.named_parameters() if isinstance(p, DTensor) and "mixer" in name]
        assert_same_model(student, alone)
        texts = [generate_texts(model, teacher.tokenizer, ["w5 w7"], Sampling()) for model in (student, alone)]
        assert texts[0] == texts[1]

    assert together(2, run) == [0, 0]


def test_a_whole_run_of_another_family_in_which_one_process_reads(teacher_folder, text_file, tmp_path):
    """GPT-2: a tied head, a table of positions, weights that lie transposed."""
    folder = tmp_path / "gpt2"
    load_tokenizer(str(teacher_folder)).save_pretrained(folder)
    tiny_teacher("gpt2", vocab_size=257).save_pretrained(folder)
    job = Conversion(str(folder), data=str(text_file), overrides=SETTINGS, device="cpu", out=tmp_path / "alone")
    convert(job, QUIET)

    def run(rank: int) -> None:
        if rank == 1:
            AutoModelForCausalLM.from_pretrained = None  # type: ignore[method-assign, assignment]  # in this fork
        convert(replace(job, out=tmp_path / "many", split="fsdp"), QUIET)

    assert together(2, run) == [0, 0]
    assert_same(tmp_path / "alone", tmp_path / "many")


def test_a_teacher_that_cannot_be_read_is_told_to_all(folder_of):
    folder = Path(folder_of("llama"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def run(rank: int) -> None:
        processes = joined(rank)
        with pytest.raises(MainFailed if rank else TeacherError, match=r"no weights for 1 tensors"):
            load_sharded_teacher(str(folder), torch.float32, CPU, processes)

    assert together(2, run) == [0, 0]


def test_a_copy_without_weights(make_teacher, make_tokens):
    """It is tied like its model, of which nothing changes; buffers, which no checkpoint holds, come along."""
    model = make_teacher(tie_word_embeddings=True)
    before = model(make_tokens(1, 8)).logits
    bare = without_weights(model)
    assert tied(bare)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert torch.equal(bare.get_buffer("model.rotary_emb.inv_freq"), model.get_buffer("model.rotary_emb.inv_freq"))
    assert torch.equal(model(make_tokens(1, 8)).logits, before)


def test_small_models_are_told_to_split_by_data(make_teacher, monkeypatch):
    """By the bytes of the weights and of the GPU alone; a CPU has no launches to wait for."""
    model, gpu = make_teacher(), torch.device("cuda")
    weights = nbytes(model.parameters())
    monkeypatch.setattr("linearize.sharding.memory_bytes", lambda device: 16 * weights)
    assert "hold the weights" in needless(model, gpu)
    assert "16 times" in needless(model, gpu)
    assert needless(model, gpu).endswith("`--split data` is faster.")
    assert needless(model, CPU) == ""
    monkeypatch.setattr("linearize.sharding.memory_bytes", lambda device: 16 * weights - 1)
    assert needless(model, gpu) == ""
