"""Text sources -> tokens -> packed batches with document boundaries and a position that is a plain integer.

documents = open_documents("notes/", text_field=None)
corpus = build_corpus(documents, tokenizer, train_tokens=8_000_000, heldout_tokens=100_000, seed=0)
rows = PackedRows(corpus, length=1024, rows=8, first_token=0, tokens=8_000_000, seed=0)
batch = rows[123]  # always the same micro-batch, so resuming at micro-batch 123 is exact
"""

from linearize.data.corpus import Corpus, build_corpus, heldout_from
from linearize.data.lengths import ScheduledRows, scheduled_rows
from linearize.data.packing import PackedRows
from linearize.data.sources import Documents, builtin_documents, default_documents, open_documents

__all__ = [
    "Corpus",
    "Documents",
    "PackedRows",
    "ScheduledRows",
    "build_corpus",
    "builtin_documents",
    "default_documents",
    "heldout_from",
    "open_documents",
    "scheduled_rows",
]
