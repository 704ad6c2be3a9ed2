"""Task scores: local rows by a scorer of our own, and everything else by lm-evaluation-harness."""
