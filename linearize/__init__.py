"""linearize: convert pretrained transformers into linear-attention students.

Importing it registers the student classes with transformers' Auto* classes.
"""

__version__ = "0.1.0"
