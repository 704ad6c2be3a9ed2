"""Parity checks on any causal language model: is what it computes the same in every way of computing it?

A student that computes one thing in training and another at decode would be found out here. All checks run in fp32 on
the same tokens (a short text, or random tokens for a model without a tokenizer), and compare logits.

Shape legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from linearize.attention import StudentAttention
from linearize.cache import StudentCacheLayer
from linearize.export import PROBE_FILE, load_student, load_student_tokenizer, probe_logits, save_model
from linearize.machine import choose_machine
from linearize.teacher import load_teacher
from linearize.teacher_files import find_checkpoint

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit where that is above 1; fp32."""

LOW_PRECISION_TOLERANCE = 0.05
"""The same for logits that were recorded in bf16, on a machine that may have been another one."""

LENGTHS = (1, 63, 64, 65, 150)
"""Where sequences are split: around the chunk of 64 tokens that is computed at once, and far from it."""


PASSAGE = """A river does not carry its water in memory. What arrives at the mouth has passed a thousand bends, and
at each of them something was kept: silt, a colour, a little warmth. Nobody downstream can ask which
stone the water touched on Tuesday, and yet the taste of it says granite or chalk, meadow or mill. A
lake is different. It holds every drop it was given, and to learn what fell in the spring you may lower
a bottle on a string to the depth where spring is stored. The lake pays for this with its size; the
river pays with what it forgets.

An engineer who builds a canal must choose. She wants the canal to be narrow, because digging is dear,
and she wants the town at its end to know what the mountains said. So she measures. On the first day she
pours red dye into the spring and waits at the lock with a white plate. On the second day she pours half
as much. On the third day she pours it at noon instead of dawn, and asks the keeper, who does not know
the hour, to guess it from the plate. When he guesses well, the canal is wide enough. When he guesses
badly, she does not blame the dye: she writes the figure down, with the date, and digs again where the
walls are rough.
"""
"""The text that models are examined with, when they have a tokenizer."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was compared.
        difference: largest difference of logits / max(1, largest logit); NaN counts as infinite.
        tolerance: the largest difference that is let pass.
        note: what exactly was done.
    """

    check: str
    difference: float
    tolerance: float
    note: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Patient:
    """The model under examination and the tokens it is examined with."""

    model: PreTrainedModel
    tokens_BT: Tensor  # [2, 200]
    whole_BTV: Tensor  # logits of the whole sequences at once, without a cache

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> "Patient":
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, model.config.vocab_size, (2, 200), generator=generator)
        if tokenizer is not None:
            ids = torch.tensor(tokenizer(PASSAGE, add_special_tokens=False)["input_ids"])
            tokens_BT = ids.repeat(-(-400 // len(ids)))[:400].view(2, 200)
        tokens_BT = tokens_BT.to(model.device)
        return cls(model, tokens_BT, logits(model, tokens_BT))

    @property
    def length(self) -> int:
        return self.tokens_BT.shape[1]


def logits(
    model: PreTrainedModel, tokens_BT: Tensor, mask_BT: Tensor | None = None, position_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, T, V] of one forward pass without a cache."""
    found: Tensor = model(
        input_ids=tokens_BT, attention_mask=mask_BT, position_ids=position_ids_BT, use_cache=False
    ).logits
    return found


def difference(left: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest right value where that is above 1; infinite when not finite."""
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        return float("inf")
    return float((left - right).abs().max() / right.abs().max().clamp_min(1))


def in_pieces(model: PreTrainedModel, tokens_BT: Tensor, sizes: list[int]) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] of feeding the tokens piece by piece through a cache, and that cache."""
    assert sum(sizes) == tokens_BT.shape[1]
    cache, found = None, []
    for piece in tokens_BT.split(sizes, dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    assert cache is not None
    return torch.cat(found, dim=1), cache


def check_chunked(patient: Patient) -> Finding:
    """A sequence fed in two pieces gives what it gives whole, wherever it is cut."""
    worst = 0.0
    for cut in LENGTHS:
        pieces, _ = in_pieces(patient.model, patient.tokens_BT, [cut, patient.length - cut])
        worst = max(worst, difference(pieces, patient.whole_BTV))
    note = f"{patient.length} tokens cut at {', '.join(map(str, LENGTHS))}"
    return Finding("whole = chunked", worst, TOLERANCE, note)


def check_stepwise(patient: Patient) -> Finding:
    """Decoding token by token gives what the whole sequence gives."""
    start = 100
    steps = [start] + [1] * (patient.length - start)
    pieces, _ = in_pieces(patient.model, patient.tokens_BT, steps)
    alone, _ = in_pieces(patient.model, patient.tokens_BT[:, :70], [1] * 70)
    worst = max(difference(pieces, patient.whole_BTV), difference(alone, patient.whole_BTV[:, :70]))
    return Finding("whole = token by token", worst, TOLERANCE, f"70 from nothing; {len(steps) - 1} after {start}")


def check_prefix(patient: Patient) -> Finding:
    """What comes later does not change what was said before."""
    worst = 0.0
    for length in LENGTHS:
        short = logits(patient.model, patient.tokens_BT[:, :length])
        worst = max(worst, difference(short, patient.whole_BTV[:, :length]))
    return Finding("prefix unchanged", worst, TOLERANCE, f"prefixes of {', '.join(map(str, LENGTHS))} tokens")


def check_padding(patient: Patient) -> Finding:
    """A left-padded prompt gives what the bare one gives, at once and then token by token."""
    pad, start = 37, 90
    tokens_BT = torch.nn.functional.pad(patient.tokens_BT, (pad, 0))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[:, :pad] = 0
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    worst = difference(logits(patient.model, tokens_BT, mask_BT, positions_BT)[:, pad:], patient.whole_BTV)
    cache, end = None, pad + start
    for begin, stop in [(0, end), *((step, step + 1) for step in range(end, end + 20))]:
        output = patient.model(
            input_ids=tokens_BT[:, begin:stop],
            attention_mask=mask_BT[:, :stop],
            position_ids=positions_BT[:, begin:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
    worst = max(worst, difference(output.logits[:, -1], patient.whole_BTV[:, start + 19]))
    return Finding("left-padded = unpadded", worst, TOLERANCE, f"{pad} padding tokens; whole, and 20 steps")


def check_batch(patient: Patient) -> Finding:
    """A sequence in a batch gives what it gives alone, also with a neighbour of another length."""
    model, tokens_BT = patient.model, patient.tokens_BT
    worst = max(difference(logits(model, tokens_BT[row : row + 1])[0], patient.whole_BTV[row]) for row in range(2))
    short = 80
    mixed_BT, mask_BT = tokens_BT.clone(), torch.ones_like(tokens_BT)
    mixed_BT[0, -short:] = tokens_BT[0, :short]
    mask_BT[0, :-short] = 0
    found = logits(model, mixed_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp_min(0))
    worst = max(worst, difference(found[0, -short:], patient.whole_BTV[0, :short]))
    worst = max(worst, difference(found[1], patient.whole_BTV[1]))
    return Finding("batch = single", worst, TOLERANCE, "2 rows; and beside a shorter neighbour")


def check_packed(patient: Patient) -> Finding:
    """Documents packed into one row do not see each other."""
    cut = 77
    positions = torch.cat([torch.arange(cut), torch.arange(patient.length - cut)]).to(patient.tokens_BT.device)
    packed = logits(patient.model, patient.tokens_BT, None, positions.expand_as(patient.tokens_BT))
    second = logits(patient.model, patient.tokens_BT[:, cut:])
    worst = max(difference(packed[:, :cut], patient.whole_BTV[:, :cut]), difference(packed[:, cut:], second))
    return Finding("packed = separate", worst, TOLERANCE, f"documents of {cut} and {patient.length - cut} tokens")


def check_reorder(patient: Patient) -> Finding:
    """Rows of a cache can be reordered and repeated, as beam search does."""
    order = torch.tensor([1, 0, 1], device=patient.tokens_BT.device)
    cut = 120
    _, cache = in_pieces(patient.model, patient.tokens_BT[:, :cut], [cut])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(order * 2)  # type: ignore[arg-type]
    output = patient.model(input_ids=patient.tokens_BT[order, cut:], past_key_values=cache, use_cache=True)
    worst = difference(output.logits, patient.whole_BTV[order, cut:])
    return Finding("beams: cache reordered", worst, TOLERANCE, "rows doubled, then 1, 0, 1 chosen")


def check_memory(patient: Patient) -> Finding:
    """The decoding state of student layers does not grow. Softmax layers that were kept are not counted."""
    sizes = []
    for length in (50, patient.length):
        _, cache = in_pieces(patient.model, patient.tokens_BT[:, :length], [length])
        layers = [layer for layer in cache.layers if isinstance(layer, StudentCacheLayer)]
        sizes.append(sum(tensor.nbytes for layer in layers for tensor in layer.state or ()))
    students = sum(isinstance(module, StudentAttention) for module in patient.model.modules())
    note = f"{students} student layers, {sizes[1] // 2:,} bytes per sequence at 50 and at {patient.length} tokens"
    return Finding("state does not grow", float(abs(sizes[1] - sizes[0])), 0.0, note)


def check_reload(patient: Patient) -> Finding:
    """Saved and loaded again, the model says the same."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(patient.model, Path(folder))
        again = load_student(folder, dtype=torch.float32, device=str(patient.model.device))
        worst = difference(logits(again, patient.tokens_BT), patient.whole_BTV)
    return Finding("saved and reloaded = original", worst, TOLERANCE, "through a temporary folder")


CHECKS: tuple[Callable[[Patient], Finding], ...] = (
    check_chunked,
    check_stepwise,
    check_prefix,
    check_padding,
    check_batch,
    check_packed,
    check_reorder,
    check_memory,
    check_reload,
)


@torch.no_grad()
def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Run every check on a model in memory. It should be in fp32 and eval mode; it is not changed.

    Args:
        say: told of each check as it begins; on a CPU some take minutes.
    """
    assert not model.training
    patient = Patient.of(model, tokenizer)
    findings = []
    for number, check in enumerate(CHECKS, 1):
        say(f"Check {number} of {len(CHECKS)}: {check.__name__.removeprefix('check_')}")
        findings.append(check(patient))
    return findings


@torch.no_grad()
def examine_folder(
    folder: str | Path, device: str = "cpu", say: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Run every check on a folder, and compare it with the logits its trained student had when it was written.

    Args:
        folder: or what else `load_teacher` takes; here a folder comes before a known model of its name.

    Raises:
        RunError: when the folder holds no model, its weights do not fit its config, or there is no such device.
        TeacherError: when there is no folder, and no such model.
    """
    choose_machine(device, "fp32")
    if not Path(folder).is_dir():
        checkpoint = find_checkpoint(str(folder))
        if checkpoint.gguf is not None:
            unpacked = load_teacher(checkpoint, dtype=torch.float32, device=device)
            return examine(unpacked.model, unpacked.tokenizer, say)
        folder = checkpoint.folder
    model = load_student(folder, dtype=torch.float32, device=device)
    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
    findings = examine(model, load_student_tokenizer(folder) if has_tokenizer else None, say)
    recorded = Path(folder) / PROBE_FILE
    if recorded.is_file():
        model = load_student(folder, device=device)  # in the dtype it was written in
        known = load_file(recorded)
        found = probe_logits(model, known["input_ids"], known["entries"])
        tolerance = TOLERANCE if model.dtype == torch.float32 else LOW_PRECISION_TOLERANCE
        note = f"logits recorded at export, {str(model.dtype).removeprefix('torch.')}"
        findings.append(Finding("reloaded = as trained", difference(found, known["logits"]), tolerance, note))
    return findings
