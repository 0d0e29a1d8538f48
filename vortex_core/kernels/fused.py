"""The kernels in Triton, each one pass over memory. `reference` says what each one computes.

Nothing is allocated, and every launch is on the device of its tensors, whichever device is current.
"""

from . import convolution, decoder_attention, fp8_attention, groupnorm, int8_product, rotary, rows
from . import dequantize as nf4
from .launch import on_device

attend = on_device(decoder_attention.attend)
attend_heads = on_device(fp8_attention.attend_heads)
bordered = on_device(groupnorm.bordered)
convolve = on_device(convolution.convolve)
convolve_doubled = on_device(convolution.convolve_doubled)
corner_taps = on_device(convolution.corner_taps)
dequantize = on_device(nf4.dequantize)
gelu = on_device(rows.gelu)
group_moments = on_device(groupnorm.group_moments)
guide = on_device(rows.guide)
modulate = on_device(rows.modulate)
multiply_int8 = on_device(int8_product.multiply_int8)
norm_silu = on_device(groupnorm.norm_silu)
norm_terms = on_device(groupnorm.norm_terms)
pack_heads = on_device(fp8_attention.pack_heads)
quantize = on_device(rows.quantize)
residual_modulate = on_device(rows.residual_modulate)
row_scales = on_device(nf4.row_scales)
rotate = on_device(rotary.rotate)


def _nothing(*sizes: int, doubled: bool = False) -> int:
    return 0


step_bytes = strip_bytes = attention_bytes = _nothing
