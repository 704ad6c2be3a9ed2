"""Operations of linear-attention students. Pure tensor functions: no modules, no transformers."""

from linearize_kernels.causal_conv import causal_conv
from linearize_kernels.gated_linear_attention import LinearState, linear_attention, linear_sums
from linearize_kernels.sliding_window import Sinks, WindowSums, window_sums

__all__ = ["LinearState", "Sinks", "WindowSums", "causal_conv", "linear_attention", "linear_sums", "window_sums"]
