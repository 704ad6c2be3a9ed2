"""Measurements of a student beside its teacher."""
