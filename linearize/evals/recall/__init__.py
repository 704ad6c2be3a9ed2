"""Recall from long contexts, generated here: no download, the same questions for the same seed.

rows = ask(model, tokenizer, "niah-1", Questions(length=4096, depths=5, samples=10, seed=0), prose)
"""

from linearize.evals.recall.ask import MARKING, Answered, Questions, ask, check_questions, training_rows
from linearize.evals.recall.base import Example, sentences_of
from linearize.evals.recall.table import TASKS, find_tasks

__all__ = [
    "MARKING",
    "TASKS",
    "Answered",
    "Example",
    "Questions",
    "ask",
    "check_questions",
    "find_tasks",
    "sentences_of",
    "training_rows",
]
