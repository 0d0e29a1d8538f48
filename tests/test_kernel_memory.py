"""What kernels allocate: the fused nothing, the references no more than they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_parts import HALF, draw, no_moments, picture
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vortex_core import nf4
from vortex_core.kernels import Moments, ScaledTensor, Window, reference

pytestmark = pytest.mark.usefixtures("seeded")


class Peak(TorchDispatchMode):
    """The bytes that operations made and that are still there, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._there = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self._there = {key: ref for key, ref in self._there.items() if not ref[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in given:
                    self._there[ref.cdata] = (ref, tensor.untyped_storage().nbytes())
        self.most = max(self.most, sum(size for _, size in self._there.values()))
        return result


def peak(call: Callable[[], object]) -> int:
    with torch.no_grad(), Peak() as mode:
        call()
    return mode.most


def empty_on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4352), (3, 900)])
def test_a_step_without_triton_takes_what_it_says(dtype: torch.dtype, batch: int, tokens: int) -> None:
    x, y, values = (empty_on_meta(batch, tokens, 3072, dtype=dtype) for _ in range(3))
    gate, shift, scale = empty_on_meta(3, 3072, dtype=dtype)
    qkv, norms = empty_on_meta(batch, tokens, 3, 24, 128, dtype=dtype), empty_on_meta(2, 128, dtype=dtype)
    cos, sin = empty_on_meta(2, tokens, 64, dtype=torch.float32)
    for call in (
        lambda: reference.modulate(x, shift, scale, ScaledTensor(values)),
        lambda: reference.residual_modulate(x, y, gate, shift, scale, ScaledTensor(values)),
        lambda: reference.rotate(qkv, *norms, cos, sin),
    ):
        assert reference.step_bytes(3072) / 4 < peak(call) <= reference.step_bytes(3072)
    # the table is made on a device by copying, which `meta` cannot
    packed, absmax = torch.zeros(3 * 2**14, 512, dtype=torch.uint8), torch.zeros(3 * 2**14, 16)
    out = torch.empty(3 * 2**14, 1024, dtype=dtype)
    assert peak(lambda: reference.dequantize(packed, absmax, out)) <= nf4.DEQUANTIZE_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inside", "outside", "height", "width"), [(512, 256, 300, 512), (128, 3, 200, 2048)])
def test_strips_without_triton_take_what_they_say(
    dtype: torch.dtype, inside: int, outside: int, height: int, width: int
) -> None:
    def empty_map(channels: int, height: int, width: int) -> Tensor:
        return empty_on_meta(1, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)

    x, out = empty_map(inside, height, width), empty_map(outside, height, width)
    bordered, weight = empty_map(inside, height + 2, width + 2), empty_on_meta(outside, inside, 3, 3, dtype=dtype)
    doubled, taps = empty_map(inside, 2 * height, 2 * width), empty_on_meta(4 * inside, 4 * inside, dtype=dtype)
    scale, shift = empty_on_meta(2, inside, dtype=torch.float32)
    moments = Moments(empty_on_meta(3, 1, 4000, dtype=torch.float32))
    bias = empty_on_meta(outside, dtype=dtype)
    limit = reference.strip_bytes(inside, outside, width, dtype.itemsize)
    assert peak(lambda: reference.group_moments(x, moments)) <= limit
    assert peak(lambda: reference.norm_silu(Window(None, x, None), scale, shift, bordered)) == 0
    assert peak(lambda: reference.convolve(bordered, weight, bias, out, moments, add=True)) <= limit
    limit = reference.strip_bytes(inside, inside, width, dtype.itemsize, doubled=True)
    call = lambda: reference.convolve_doubled(bordered, taps, scale.to(dtype), doubled, moments)  # noqa: E731
    assert limit / 2 < peak(call) <= limit


@pytest.mark.gpu
def test_fused_kernels_allocate_nothing() -> None:
    fused = pytest.importorskip("vortex_core.kernels.fused")
    x, out = (picture(1, 128, size, size, dtype=HALF) for size in (34, 32))
    weight, taps = picture(128, 128, 3, 3, dtype=HALF), draw(512, 512, dtype=HALF)
    doubled, moments, made = picture(1, 128, 64, 64, dtype=HALF), no_moments(32, 2000), draw(2, 128)
    tokens = draw(4, 900, 128, dtype=HALF)

    def run() -> None:
        moments.parts = 0
        fused.group_moments(out, moments)
        fused.norm_terms(moments, weight[0, :, 0, 0], weight[1, :, 0, 0], 1e-6, made)
        fused.norm_silu(Window(None, out, None), *made, x)
        fused.bordered(Window(None, out, None), x)
        fused.convolve(x, weight, weight[0, :, 0, 0], out, moments, add=True)
        fused.corner_taps(weight, taps)
        fused.convolve_doubled(x, taps, weight[0, :, 0, 0], doubled, moments)
        fused.attend(*tokens)

    run()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
