"""What `metrics.json` says of a short run."""

from __future__ import annotations

from typing import Any

METRICS: dict[str, Any] = {
    "model": "smollm2",
    "teacher": {
        "name": "owner/teacher",
        "origin": "owner/teacher@abc from the Hugging Face Hub",
        "revision": "abc",
        "sha256": None,
        "license": "apache-2.0",
        "hub": "owner/teacher",
        "languages": ["en"],
        "gated": False,
        "attention": "sdpa",
    },
    "recipe": "swa-sink",
    "recipe_hash": "0123",
    "text": {"name": "owner/text", "fingerprint": "x", "epochs": 1.0, "dataset": "owner/text"},
    "device": "cpu",
    "precision": "fp32",
    "seed": 0,
    "versions": {"linearize": "0.1.0"},
    "command": "linearize convert --model smollm2 --recipe swa-sink --out out",
    "perplexity": [{"source": "held-out", "length": 512, "teacher": 10.0, "student": 12.0, "ratio": 1.2}],
    "untrained": {},
    "stages": [{"name": "transfer", "seconds": 3.0}],
}
