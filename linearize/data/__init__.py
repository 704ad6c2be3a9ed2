"""Text sources -> tokens -> packed batches with document boundaries and a position that is a plain integer.

sources, said = choose_sources(["notes/=0.7", "chats.jsonl=0.3"], None, None)
corpus = load_corpus(sources, tokenizer, Budget(train_tokens=8_000_000, heldout_tokens=100_000), say=print)
rows = PackedRows(corpus, length=1024, rows=8, first_token=0, tokens=8_000_000, seed=0)
batch = rows[123]  # always the same micro-batch, so resuming at micro-batch 123 is exact
"""

from linearize.data.cache import load_corpus
from linearize.data.corpus import Budget, Corpus, build_corpus
from linearize.data.heldout import heldout_from
from linearize.data.lengths import ScheduledRows, scheduled_rows
from linearize.data.mixture import RecipeData, Source, SourceConfig, check_sources, choose_sources
from linearize.data.packing import PackedRows
from linearize.data.sources import Documents, builtin_documents, check_documents, default_documents, open_documents

__all__ = [
    "Budget",
    "Corpus",
    "Documents",
    "PackedRows",
    "RecipeData",
    "ScheduledRows",
    "Source",
    "SourceConfig",
    "build_corpus",
    "builtin_documents",
    "check_documents",
    "check_sources",
    "choose_sources",
    "default_documents",
    "heldout_from",
    "load_corpus",
    "open_documents",
    "scheduled_rows",
]
