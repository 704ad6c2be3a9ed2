"""Tiny teachers, a tokenizer and batches that many files share."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its interpreter then runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

if asked := os.environ.keys() & {"COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH"}:
    for name in asked:  # before anything imports Rich or Typer: they would lay text out and colour it as these ask
        del os.environ[name]

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from linearize.job import Conversion
from linearize.pipeline import Converted, convert
from linearize.stages import Batch
from tests.short_runs import short_conversion
from tests.tiny_llama import tiny_model, tiny_tokenizer, write_gguf

VOCABULARY = 97
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

torch.set_num_threads(1)  # tensors are tiny; two threads on a busy machine wait for each other, 100 times as long


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU the Triton kernels are tested on it, and `-m gpu` finds their tests."""
    for item in items:
        if torch.cuda.is_available() and item.path.name.startswith("test_kernels_triton"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def interpreter_knows_bfloat16() -> None:
    """Triton's interpreter (3.6) cuts fp32 to bfloat16 where hardware rounds, and multiplies matrices of the 16-bit
    integers that bfloat16 numbers are kept in, as it adds and subtracts them.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, widened(left), widened(right), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != float32 or target.scalar != bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.astype("float32")).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), bfloat16)

    def in_fp32(operation: Any) -> Any:
        return lambda self, left, right: cast_impl(self, operation(self, widened(left), widened(right)), left.dtype)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fadd = in_fp32(InterpreterBuilder.create_fadd)
    InterpreterBuilder.create_fsub = in_fp32(InterpreterBuilder.create_fsub)
    InterpreterBuilder.cast_impl = cast_impl


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests cache, and fixtures of whole modules, stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_proxy_between() -> Iterator[None]:
    """Stand-in servers are on this machine; a proxy that the user's environment names knows nothing of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, f"{os.environ.get(name, '')},127.0.0.1")
        yield


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., PreTrainedModel]:
    """A function that builds a tiny random teacher whose attention is far from flat."""

    def make(family: str = "llama", **overrides: Any) -> PreTrainedModel:
        config_class, model_class = CLASSES[family]
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        if family == "mistral":
            sizes["sliding_window"] = None
        torch.manual_seed(0)
        model = model_class(config_class(**{**sizes, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # they start at zero, which would hide that one is dropped
                    parameter.normal_(std=0.5)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def packed_batch() -> Batch:
    """Two rows of 24 tokens: documents of 10, 1 and 13 tokens, and one of 24."""
    ids_BT = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    positions_BT = torch.stack([torch.cat([torch.arange(10), torch.arange(1), torch.arange(13)]), torch.arange(24)])
    segments_BT = torch.tensor([[0] * 10 + [1] + [2] * 13, [0] * 24])
    targets_BT = torch.zeros(2, 24, dtype=torch.bool)
    targets_BT[:, :-1] = segments_BT[:, 1:] == segments_BT[:, :-1]
    return Batch(ids_BT, positions_BT, segments_BT, targets_BT)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


@pytest.fixture(scope="session")
def teacher_folder(make_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    make_teacher(vocab_size=257, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture
def short_job(teacher_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., Conversion]:
    """A function that describes a conversion of a few steps into a folder of the test's own."""

    def make(out: str = "student", *overrides: str, resume: bool = False, overwrite: bool = False) -> Conversion:
        short = short_conversion(teacher_folder, text_file, tmp_path / out, *overrides)
        return replace(short, resume=resume, overwrite=overwrite)

    return make


@pytest.fixture(scope="session")
def converted(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A student that keeps softmax in one layer of three. Its folder is not to be changed."""
    out = tmp_path_factory.mktemp("out") / "student"
    return convert(short_conversion(teacher_folder, text_file, out, "keep_softmax=[1]"), Console(quiet=True))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to; `llama_copy` may be."""
    path = tmp_path_factory.mktemp("llama") / "tiny-llama"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def llama_copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = random.Random(0)
    lines = [" ".join(words.choices(["tide", "salt", "gull", "rope", "keel", "mast"], k=60)) for _ in range(40)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path
