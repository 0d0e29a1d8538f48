"""The kernels in Triton. `reference` says what each one computes; here it is one pass over memory each."""

from .decode import decode
from .groupnorm import group_moments, norm_silu
from .rotary import rotate
from .rows import gelu, modulate, quantize, residual_modulate

__all__ = ["decode", "gelu", "group_moments", "modulate", "norm_silu", "quantize", "residual_modulate", "rotate"]
