"""Export one decoding step of every recipe's mixer to ONNX, run it, and compare it with torch.

    pip install onnx onnxscript onnxruntime
    python scripts/export_onnx.py

A random model of two student layers reads 19 tokens in torch; its states become inputs and outputs of a graph that
reads one more. Printed for each recipe: nodes, opset, and the largest differences of logits and states in onnxruntime,
after one step and after a second one that starts from the graph's own states. Then the operator LinearAttention (opset
27) against our recurrences, in ONNX's reference evaluator and in onnxruntime.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linearize.cache import StudentCacheLayer
from linearize.recipe import load_recipe, recipe_names
from linearize.surgery import graft, plan_surgery
from linearize_kernels import linear_sums
from linearize_kernels.gated_delta import gated_delta_rule


class Step(nn.Module):
    """Tokens [1, 1], their position [1, 1] and the layers' states -> logits [1, V] and the new states."""

    def __init__(self, model: PreTrainedModel, counts: list[int]) -> None:
        super().__init__()
        self.model, self.counts = model, counts

    def forward(self, ids: Tensor, position: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache, at = DynamicCache(), 0
        for count in self.counts:
            layer = StudentCacheLayer()
            layer.write(tuple(states[at : at + count]), 1)
            cache.layers.append(layer)
            at += count
        logits = self.model(ids, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits[:, -1], *(tensor for layer in cache.layers for tensor in layer.state)


def started(recipe_name: str) -> tuple[Step, list[Tensor]]:
    """A step of a random student, and its arguments after 19 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    graft(model, plan_surgery(model, load_recipe(recipe_name).mixer))
    model.requires_grad_(False)
    ids, cache = torch.arange(5, 25)[None], DynamicCache()
    model(ids[:, :19], past_key_values=cache, use_cache=True)
    states = [tensor.clone() for layer in cache.layers for tensor in layer.state]
    step = Step(model, [len(layer.state) for layer in cache.layers]).eval()
    return step, [ids[:, 19:], torch.tensor([[19]]), *states]


def export_step(recipe_name: str, folder: Path) -> str:
    """Export, run two steps, compare; one row of the table."""
    step, arguments = started(recipe_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(step, tuple(arguments), dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "step.onnx")
    session = onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(values: list[Tensor]) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, fed)]

    first, expected = run(arguments), step(*arguments)
    then = [torch.tensor([[7]]), torch.tensor([[20]])]
    again, expected_again = run([*then, *first[1:]]), step(*then, *expected[1:])
    worst = [largest(a, b) for a, b in zip(first, expected, strict=True)]
    nodes = collections.Counter(node.op_type for node in program.model.graph)
    differences = (worst[0], max(worst[1:]), largest(again[0], expected_again[0]))
    cells = [recipe_name, nodes.total(), program.model.opset_imports[""], *(f"{value:.1e}" for value in differences)]
    return f"| {' | '.join(map(str, cells))} |"


def largest(found: Tensor, expected: Tensor) -> float:
    return (found.float() - expected.float()).abs().max().item() if expected.numel() else 0.0


def operator(rule: str, fed: dict[str, np.ndarray], heads: tuple[int, int], shapes: list[list[int]]) -> onnx.ModelProto:
    """A graph of one LinearAttention node."""
    settings = {"update_rule": rule, "q_num_heads": heads[0], "kv_num_heads": heads[1], "scale": 1.0}
    node = helper.make_node("LinearAttention", list(fed), ["y", "state"], **settings)
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in fed.items()]
    found = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("y", "state"), shapes, strict=True)
    ]
    graph = helper.make_graph([node], "operator", given, found)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=11)


def try_operator() -> None:
    """Ours against ONNX's: a normaliser is one more value, always 1."""
    torch.manual_seed(0)
    batch, length, heads, groups, features, values = 2, 6, 4, 2, 8, 5
    q, k = torch.rand(batch, length, heads, features), torch.rand(batch, length, heads, features)
    v, decay = torch.randn(batch, length, heads, values), -torch.rand(batch, length, heads)
    num, den, _ = linear_sums(q, k, v, decay)
    fed = {"q": q, "k": k, "v": torch.cat([v, torch.ones(batch, length, heads, 1)], -1)}
    fed |= {"past": torch.zeros(batch, heads, features, values + 1), "decay": decay}
    compare("gated", fed, (heads, heads), torch.cat([num, den[..., None]], -1))
    q, k = (nn.functional.normalize(torch.randn(batch, length, n, features), dim=-1) for n in (heads, groups))
    v, decay = torch.randn(batch, length, groups, values), -torch.rand(batch, length, groups)
    beta = torch.rand(batch, length, groups)
    fed = {"q": q, "k": k, "v": v, "past": torch.zeros(batch, groups, features, values), "decay": decay, "beta": beta}
    compare("gated_delta", fed, (heads, groups), gated_delta_rule(q, k, v, decay, beta)[0])


def compare(rule: str, tensors: dict[str, Tensor], heads: tuple[int, int], expected: Tensor) -> None:
    packed = {name: (x if name == "past" or x.ndim == 3 else x.flatten(2)).numpy() for name, x in tensors.items()}
    shapes = [list(expected.flatten(2).shape), list(packed["past"].shape)]
    model = operator(rule, packed, heads, shapes)
    found = torch.tensor(ReferenceEvaluator(model).run(None, packed)[0])
    print(f"LinearAttention, {rule}: reference evaluator differs by {largest(found, expected.flatten(2)):.1e}")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = torch.tensor(session.run(None, packed)[0])
        print(f"LinearAttention, {rule}: onnxruntime differs by {largest(found, expected.flatten(2)):.1e}")
    except Exception as error:  # what it raises is not documented, and this is what is to be found out
        print(f"LinearAttention, {rule}: onnxruntime cannot run it: {str(error).splitlines()[0][:200]}")


@torch.no_grad()
def main() -> None:
    """Print the table and the trial of the operator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
    print("| recipe | nodes | opset | logits | states | logits of a second step |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name in options.recipe or recipe_names():
            print(export_step(name, Path(work)), flush=True)
    try_operator()


if __name__ == "__main__":
    main()
