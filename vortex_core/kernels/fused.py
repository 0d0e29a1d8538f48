"""The kernels in Triton. `reference` says what each one computes; here it is one pass over memory each."""

from .attention import attend
from .convolution import convolve, convolve_doubled, corner_taps
from .decode import decode
from .groupnorm import bordered, group_moments, norm_silu, norm_terms
from .heads import attend_heads, pack_heads
from .rotary import rotate
from .rows import gelu, modulate, quantize, residual_modulate

__all__ = [
    "attend",
    "attend_heads",
    "bordered",
    "convolve",
    "convolve_doubled",
    "corner_taps",
    "decode",
    "gelu",
    "group_moments",
    "modulate",
    "norm_silu",
    "norm_terms",
    "pack_heads",
    "quantize",
    "residual_modulate",
    "rotate",
]
