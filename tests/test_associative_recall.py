"""The script that asks toys for recall: its documents, and the way from a teacher to a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_scaling import script


def test_a_question_stands_as_far_from_its_pair_as_is_said() -> None:
    recall = script("associative_recall")
    ids_BT, gap_NP = recall.documents(5, 7, torch.Generator().manual_seed(0))
    for ids, gaps in zip(ids_BT, gap_NP, strict=True):
        for asked, gap in enumerate(gaps.tolist()):
            question = 14 + 2 * asked
            assert question - gap < 14
            assert torch.equal(ids[question : question + 2], ids[question - gap : question - gap + 2])
        assert len(set(ids[:14:2].tolist())) == 7
    assert ids_BT.min() > 0
    assert ids_BT.max() <= recall.KEYS + recall.VALUES


def test_from_a_teacher_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = script("associative_recall")
    budget = ["--steps", "2", "--documents", "200", "--tokens", "16k", "--row", "lizard", "--device", "cpu"]
    for do in ("teacher", "train", "table"):
        monkeypatch.setattr(sys, "argv", ["associative_recall.py", do, "--out", str(tmp_path), *budget])
        capsys.readouterr()
        recall.main()
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["|", "|---|---|---|---|", "| teacher", "| `lizard`", "| `lizard`, linear branch off"]
