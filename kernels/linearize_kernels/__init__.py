"""Operations of linear-attention students. Pure tensor functions: no modules, no transformers."""

from linearize_kernels.causal_conv import causal_conv, causal_convs
from linearize_kernels.distillation_loss import LossWeights, distillation_terms
from linearize_kernels.gated_linear_attention import Branch, LinearState, gated_linear_attention, linear_sums
from linearize_kernels.hedgehog_attention import hedgehog_attention
from linearize_kernels.rotary import rotary
from linearize_kernels.windowed_linear_attention import (
    Far,
    FarStep,
    LocalState,
    Near,
    NearStep,
    Sinks,
    Token,
    query_dtype,
    window_attention,
    window_step,
    windowed_linear_attention,
)

__all__ = [
    "Branch",
    "Far",
    "FarStep",
    "LinearState",
    "LocalState",
    "LossWeights",
    "Near",
    "NearStep",
    "Sinks",
    "Token",
    "causal_conv",
    "causal_convs",
    "distillation_terms",
    "gated_linear_attention",
    "hedgehog_attention",
    "linear_sums",
    "query_dtype",
    "rotary",
    "window_attention",
    "window_step",
    "windowed_linear_attention",
]
