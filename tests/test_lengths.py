"""Row lengths that change within a stage: arithmetic, rows, refusals, and the place to resume at."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from linearize.data import Corpus, PackedRows, scheduled_rows
from linearize.errors import RunError
from linearize.stages.base import StageConfig
from linearize.train import check_budget


def stage(**values) -> StageConfig:
    settings = {"kind": "toy", "tokens": 1000, "batch": 4, "micro_batch": 2, "lengths": [[0.25, 4], [0.75, 16]]}
    return StageConfig(**(settings | values))


def corpus(size: int = 2000) -> Corpus:
    return Corpus("text", "0", np.arange(size, dtype=np.int32), np.arange(0, size, 7), 1.0, {})


def test_a_step_keeps_its_tokens():
    config = stage()
    assert (config.length, config.steps, config.accumulation) == (16, 15, 2)
    first, second = config.pieces()
    assert (first.steps, first.length, first.rows, first.tokens) == (4, 4, 8, 4 * 64)
    assert (second.steps, second.length, second.rows) == (11, 16, 2)
    assert first.tokens + second.tokens == 1000  # with the tokens that fill no step


def test_rows_follow_the_schedule_and_read_every_token_once():
    config = stage()
    rows = scheduled_rows(corpus(), config, first_token=100, seed=3)
    assert len(rows) == config.steps * config.accumulation
    shapes = [tuple(rows[index].input_ids_BT.shape) for index in range(len(rows))]
    assert shapes == [(8, 4)] * 8 + [(2, 16)] * 22
    seen = np.concatenate([rows[index].input_ids_BT.numpy().ravel() for index in range(len(rows))])
    assert np.unique(seen).size == seen.size == 960
    assert seen.min() >= 100
    assert seen.max() < 1100
    assert np.sort(seen[:256]).tolist() == list(range(100, 356))  # the first piece reads the first part of the text
    assert rows[-1].input_ids_BT.equal(rows[len(rows) - 1].input_ids_BT)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_one_length_reads_the_rows_it_always_read():
    config = stage(lengths=[], length=16)
    rows = scheduled_rows(corpus(), config, first_token=0, seed=3)
    plain = PackedRows(corpus(), length=16, rows=2, first_token=0, tokens=1000, seed=3)
    assert len(rows) == len(plain)
    assert all(rows[index].input_ids_BT.equal(plain[index].input_ids_BT) for index in range(len(plain)))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"lengths": [[0.5, 4], [0.4, 16]]}, "add up to 0.9"),
        ({"lengths": [[0.5, 6], [0.5, 16]]}, "16 is no multiple of 6"),
        ({"length": 32}, "length is 32, the longest of lengths 16"),
        ({"lengths": [[0.5, 4], [0.5, "long"]]}, "valid integer"),
        ({"lengths": [[0.0, 4], [1.0, 16]]}, "greater than 0"),
        ({"lengths": 3}, "valid tuple"),
    ],
)
def test_schedules_that_cannot_be_followed(values, said):
    with pytest.raises(ValidationError, match=said):
        stage(**values)


def test_a_dump_is_read_again():
    assert stage() == StageConfig(**stage().model_dump(mode="json"))


def test_a_piece_without_a_step_is_refused():
    with pytest.raises(RunError, match=r"stages\.1: 2 steps are too few.*rows of 4"):
        check_budget(stage(tokens=130, lengths=[[0.1, 4], [0.9, 16]]), 1)
