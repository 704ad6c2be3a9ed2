"""linearize: convert pretrained transformers into linear-attention students.

>>> import linearize
>>> result = linearize.convert("smollm2", recipe="hedgehog", tokens="150k", out="out/student")  # doctest: +SKIP

Importing it registers the student classes with transformers' Auto* classes, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads a student.
"""

__version__ = "0.1.0"

from linearize.api import convert, load_recipe, load_student

__all__ = ["__version__", "convert", "load_recipe", "load_student"]
