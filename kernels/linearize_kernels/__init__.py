"""Operations of linear-attention students. Pure tensor functions: no modules, no transformers."""

from linearize_kernels.linear_attention import LinearState, linear_attention

__all__ = ["LinearState", "linear_attention"]
