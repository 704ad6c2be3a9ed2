"""Train one student on text that the teacher wrote and one on as much real text, and measure both on the same text.

    linearize data generate --model smollm2 --tokens 2M --out generated.parquet --start "<|endoftext|>"
    python scripts/compare_generated.py --model smollm2 --generated generated.parquet --real train.parquet \
        --heldout heldout.parquet --tokens 2M --out runs/compare

Both texts are cut to about `--tokens` tokens, their documents in the order of `--seed`; both conversions use the same
recipe, budget and seed. Writes `<out>/compare.json` beside the two students; a finished student is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from linearize.data import Documents, open_documents
from linearize.data.encoding import Encoder, pieces
from linearize.job import Conversion
from linearize.pipeline import convert
from linearize.recipe import read_tokens
from linearize.run_folder import write_json
from linearize.teacher import load_tokenizer

SIDES = ("generated", "real")


def main() -> None:
    options = _options()
    tokens = read_tokens(options.tokens)
    encode = Encoder.of(load_tokenizer(options.model))
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for side, given in zip(SIDES, (options.generated, options.real), strict=True):
        cut = options.out / f"{side}.parquet"
        found = write_first(open_documents(given, None), encode, tokens, options.seed, cut)
        print(f"{side}: {found:,} tokens of {given}")
        student = options.out / side
        if not (student / "metrics.json").is_file():
            convert(_conversion(options, cut, student))
        rows += _rows(side, found, json.loads((student / "metrics.json").read_text("utf-8")))
    write_json(options.out / "compare.json", rows)
    Console().print(_table(rows))


def write_first(documents: Documents, encode: Encoder, tokens: int, seed: int, file: Path) -> int:
    """Write the first documents of a seed's order that together have about `tokens` tokens; how many they have."""
    chosen: list[dict[str, Any]] = []
    found = 0
    for source, content in documents.read(seed):
        size = sum(part.tokens.size for piece in pieces([(source, content)]) for part in encode([piece]))
        if isinstance(content, str):
            content = content[: len(content) * (tokens - found) // size]  # of the last text, about what is missing
            size = min(size, tokens - found)
            chosen.append({"source": source, "text": content})
        else:
            chosen.append({"source": source, "messages": [message._asdict() for message in content]})
        found += size
        if found >= tokens:
            break
    pq.write_table(pa.Table.from_pylist(chosen), file)
    return found


def _conversion(options: argparse.Namespace, data: Path, out: Path) -> Conversion:
    return Conversion(
        model=options.model,
        recipe=options.recipe,
        out=out,
        data=str(data),
        heldout=options.heldout,
        tokens=options.budget or options.tokens,
        overrides=(f"seed={options.seed}", *options.set),
        device=options.device,
        overwrite=(out / "run" / "run.json").is_file(),
    )


def _rows(side: str, tokens: int, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    facts = {"side": side, "text_tokens": tokens, "device": metrics["device"], "recipe": metrics["recipe"]}
    return [{**facts, "epochs": metrics["text"]["epochs"], **row} for row in metrics["perplexity"]]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("held-out source", "teacher", *(f"student on {side} text" for side in SIDES), "ratios")
    for source in dict.fromkeys(row["source"] for row in rows):
        found = {row["side"]: row for row in rows if row["source"] == source}
        ratios = " / ".join(f"{found[side]['ratio']:.3f}" for side in SIDES)
        students = [f"{found[side]['student']:,.2f}" for side in SIDES]
        table.add_row(source, f"{found['real']['teacher']:,.2f}", *students, ratios)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--generated", required=True, help="what `linearize data generate` wrote")
    parser.add_argument("--real", required=True, help="real text, as for --data of convert")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--tokens", required=True, help="of each text")
    parser.add_argument("--budget", help="training tokens of each student; default: --tokens")
    parser.add_argument("--recipe", default="lizard")
    parser.add_argument("--set", action="append", default=[], help="overrides of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
