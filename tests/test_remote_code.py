"""A checkpoint's own code loads it where there is torch and transformers, but no linearize."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from linearize import remote_code
from linearize.export import export_student, load_student
from linearize.families import FAMILIES
from linearize.mixers import MIXERS, mixer_config
from linearize.recipe import load_recipe
from linearize.surgery import graft, plan_surgery

MakeTeacher = Callable[..., PreTrainedModel]

WITHOUT_LINEARIZE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"linearize", "linearize_kernels", "pydantic"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

LOAD_AND_RUN = """
import torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

work = Path(sys.argv[1])
ids = torch.load(work / "ids.pt")
found = {}
for folder in sorted(path for path in work.iterdir() if path.is_dir() and path.name != "modules"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    found[folder.name] = logits, model.generate(ids, max_new_tokens=6, do_sample=False)
model.save_pretrained(work / "again")
again = AutoModelForCausalLM.from_pretrained(work / "again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(ids, use_cache=False).logits, logits)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).linearize["layers"] == [0, 2]
writer = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
assert writer("w5 w9", max_new_tokens=3)[0]["generated_text"].startswith("w5 w9")
assert not any(name.partition(".")[0] == "linearize" for name in sys.modules)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
config.linearize["mixer"]["zzz"] = 1
try:
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
except ValueError as error:  # the stand-in for pydantic refuses what nobody would read
    assert "zzz: Extra inputs are not permitted" in str(error)
    torch.save(found, work / "found.pt")
"""


@pytest.fixture(scope="module")
def work(make_teacher: MakeTeacher, make_tokens: Callable[..., Tensor], tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A folder with a student of every mixer, layer 1 softmax, and tokens."""
    place: Path = tmp_path_factory.mktemp("students")
    for kind in MIXERS:
        recipe = load_recipe("hedgehog").model_copy(update={"mixer": mixer_config({"kind": kind})})
        model = make_teacher("mistral" if kind == "gdn" else "llama")
        grafted = graft(model, plan_surgery(model, recipe.mixer, (1,)))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in grafted.mixer_parameters().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        export_student(grafted, tokenizer, recipe, place / kind)
    torch.save(make_tokens(2, 70), place / "ids.pt")
    return place


def test_every_student_loads_without_linearize(work: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_LINEARIZE + LOAD_AND_RUN, str(work)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, ids = torch.load(work / "found.pt"), torch.load(work / "ids.pt")
    assert found.keys() == MIXERS.keys()
    for kind in MIXERS:
        student = load_student(work / kind)
        with torch.no_grad():
            assert torch.equal(found[kind][0], student(ids, use_cache=False).logits), kind
        assert torch.equal(found[kind][1], student.generate(ids, max_new_tokens=6, do_sample=False)), kind


@pytest.mark.parametrize("kind", ["swa", "gdn"])
def test_a_student_that_is_saved_again_keeps_its_code(work: Path, kind: str, tmp_path: Path) -> None:
    """One that was fine-tuned has to load elsewhere, too: its config.json names the code."""
    load_student(work / kind).save_pretrained(tmp_path)
    assert (tmp_path / remote_code.FILE).read_text() == (work / kind / remote_code.FILE).read_text()
    assert '"auto_map"' in (tmp_path / "config.json").read_text()


def test_a_student_is_not_uploaded_before_its_code_is_written(work: Path, tmp_path: Path) -> None:
    student = load_student(work / "swa")
    with pytest.raises(ValueError, match=r"could not be loaded; call push_to_hub\(repo_id\) of the model"):
        student.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="uploads before the student's code is written"):
        student.save_pretrained(tmp_path, True, None, True)
    assert not list(tmp_path.iterdir())
    student.save_pretrained(tmp_path, push_to_hub=False)
    assert (tmp_path / remote_code.FILE).is_file()


@pytest.mark.parametrize("kind", MIXERS)
def test_the_code_is_small_and_asks_for_torch_and_transformers_only(work: Path, kind: str) -> None:
    path = work / kind / remote_code.FILE
    outside = set(get_imports(path)) - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}
    assert get_relative_imports(path) == []
    code = path.read_text()
    assert len(code) < 120_000
    assert "SPDX-License-Identifier: Apache-2.0" in code
    for other, entry in MIXERS.items():  # one mixer travels, not all
        assert (f"class {entry.module.__name__}(" in code) == (other == kind)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_code_of_every_family(model_type: str) -> None:
    stem = FAMILIES[model_type].causal_lm.removesuffix("ForCausalLM")
    names = f"Linearized{stem}Config", f"Linearized{stem}ForCausalLM"
    code = remote_code.remote_code(model_type, "swa", *names)
    compile(code, model_type, "exec")
    assert code.endswith(f'{names[0]}, {names[1]} = _make_classes(FAMILIES["{model_type}"])\n')
