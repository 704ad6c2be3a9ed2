"""The card that goes to the Hub: its metadata is valid, and what is not known is not said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import ModelCard, constants, repocard

from linearize.card import metadata, model_card
from linearize.recipe import Recipe, load_recipe
from tests.hub_server import Hub, running_hub
from tests.metrics_of_a_run import METRICS


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("swa-sink", ["mixer.window=8"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


def test_the_card_is_valid(hub: Hub, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub's own reading; its validate() asks a hub, before its version 2 always the real one."""
    session = repocard.get_session

    class Here:
        def post(self, url: str, **named: Any) -> Any:
            return session().post(hub.endpoint + urlsplit(url).path, **named)

    monkeypatch.setattr(repocard, "get_session", Here)
    card = ModelCard(model_card(recipe, METRICS, "user/student"))
    card.validate()
    data = card.data
    assert data.base_model == "owner/teacher"
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.datasets == ["owner/text"]
    assert {"linearize", "linear-attention", "swa"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 12.0, "held-out")
    text = card.text
    for part in (METRICS["command"], "arxiv.org/abs/2309.17453", "| held-out | 512 | 10.00 | 12.00 | 1.20 |", "abc"):
        assert part in text
    assert f"| tokens trained | {recipe.tokens:,} |" in text


def test_a_card_of_which_little_is_known(recipe: Recipe) -> None:
    teacher = {**METRICS["teacher"], "hub": None, "license": None, "languages": [], "revision": None, "sha256": "ff"}
    metrics = {**METRICS, "teacher": teacher, "text": {**METRICS["text"], "dataset": None}, "perplexity": []}
    said = metadata(recipe, metrics).to_dict()
    assert said.keys() == {"library_name", "pipeline_tag", "tags"}
    card = ModelCard(model_card(recipe, metrics))
    assert "licence | unknown" in card.text
