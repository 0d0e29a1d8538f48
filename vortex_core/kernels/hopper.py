"""Attention in fp8 for Hopper: copies, and two groups of 64 queries, each in warps of their own.

One warp keeps key and value tiles coming with the bulk copy engine. Two warpgroups share every tile: while one is busy
with its softmax, the other has the tensor cores, and inside a group the next scores are computed beside the softmax.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .operand import TILE, Heads

LOG2_E = 1.4426950408889634
ROWS = 64  # queries of a warpgroup
GROUPS = 2
STAGES = 3


@gluon.jit
def _load(k, v, k_tiles, v_tiles, k_full, v_full, k_free, v_free, plane, tiles, C: gl.constexpr, STAGES: gl.constexpr):
    TILE: gl.constexpr = k.block_type.shape[0]
    for i in range(tiles):
        slot, phase = i % STAGES, i // STAGES & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [(plane * tiles + i) * TILE, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [plane * C, i * TILE], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _softmax(scores, highest, total, summed, unit, k_scale, fade_scale, LAYOUT: gl.constexpr):
    scale = unit * k_scale
    now = gl.maximum(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale[:, None] - (now - 8)[:, None])
    fade = gl.exp2(highest - now)
    total = total * fade + gl.sum(weights, 1)
    summed = summed * (fade * fade_scale)[:, None]
    return gl.convert_layout(weights.to(gl.float8e4nv), LAYOUT), now, total, summed


@gluon.jit
def _attend(
    queries, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free, q_scale, k_scale, v_scale, out, out_t,
    plane, first, tokens, tiles, softmax_scale, GROUP: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = k_tiles.shape[1]
    ROWS: gl.constexpr = queries.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    SUMMED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMMED, 4)
    row = first + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    unit = gl.load(q_scale + plane * tiles * TILE + row) * softmax_scale
    k_scale += plane * tiles
    v_scale += plane * tiles
    highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    summed = gl.zeros([ROWS, C], gl.float32, SUMMED)
    empty = gl.zeros([ROWS, TILE], gl.float32, SCORES)
    q = queries.index(GROUP)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), empty, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    previous = gl.load(v_scale)
    key_scale, value_scale = gl.load(k_scale), previous
    for i in range(tiles - 1):
        slot, phase = i % STAGES, i // STAGES & 1
        after, after_phase = (i + 1) % STAGES, (i + 1) // STAGES & 1
        next_key_scale, next_value_scale = gl.load(k_scale + i + 1), gl.load(v_scale + i + 1)
        mbarrier.wait(k_full.index(after), after_phase)
        following = warpgroup_mma(q, k_tiles.index(after).permute((1, 0)), empty, use_acc=False, is_async=True)
        weights, highest, total, summed = _softmax(
            scores, highest, total, summed, unit, key_scale, previous / value_scale, WEIGHTS
        )
        mbarrier.wait(v_full.index(slot), phase)
        adding = warpgroup_mma(weights, v_tiles.index(slot).permute((1, 0)), summed, is_async=True)
        scores, summed = warpgroup_mma_wait(0, deps=[following, adding])
        mbarrier.arrive(k_free.index(after), count=1)
        mbarrier.arrive(v_free.index(slot), count=1)
        previous, key_scale, value_scale = value_scale, next_key_scale, next_value_scale

    last = tiles - 1
    key = last * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    scores = gl.where((key < tokens)[None, :], scores, float("-inf"))
    weights, highest, total, summed = _softmax(
        scores, highest, total, summed, unit, key_scale, previous / value_scale, WEIGHTS
    )
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    summed = warpgroup_mma(weights, v_tiles.index(last % STAGES).permute((1, 0)), summed)
    factor = gl.convert_layout(value_scale / total, gl.SliceLayout(1, SUMMED))
    row = first + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMMED))
    place = out + row.to(gl.int64)[:, None] * out_t + gl.arange(0, C, gl.SliceLayout(0, SUMMED))[None, :]
    gl.store(place, (summed * factor[:, None]).to(out.dtype.element_ty), mask=(row < tokens)[:, None])


@gluon.jit
def _attention(
    q, k, v, q_scale, k_scale, v_scale, out, out_b, out_t, tokens, tiles, softmax_scale,
    H: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = k.block_type.shape[0]
    ROWS: gl.constexpr = q.block_type.shape[0]
    plane, first = gl.program_id(1), gl.program_id(0) * (2 * ROWS)
    out += (plane // H).to(gl.int64) * out_b + plane % H * C
    queries = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, C], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE, C], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, C, TILE], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    mbarrier.expect(q_full, 2 * q.block_type.nbytes)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [plane * tiles * TILE + first + i * ROWS, 0], q_full, queries.index(i))
    gl.warp_specialize(
        [
            (_attend, (queries, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free, q_scale, k_scale, v_scale,
                       out, out_t, plane, first, tokens, tiles, softmax_scale, 0, C, STAGES)),
            (_attend, (queries, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free, q_scale, k_scale, v_scale,
                       out, out_t, plane, first, tokens, tiles, softmax_scale, 1, C, STAGES)),
            (_load, (k, v, k_tiles, v_tiles, k_full, v_full, k_free, v_free, plane, tiles, C, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention(heads: Heads, out: Tensor) -> None:
    """See `reference.attention`."""
    batch, tokens, _ = out.shape
    _, count, padded, channels = heads.q.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    q = TensorDescriptor.from_tensor(heads.q.flatten(0, 2), [ROWS, channels], layout)
    k = TensorDescriptor.from_tensor(heads.k.flatten(0, 2), [TILE, channels], layout)
    v = TensorDescriptor.from_tensor(heads.v.flatten(0, 2), [channels, TILE], layout)
    _attention[(padded // (GROUPS * ROWS), batch * count)](
        q, k, v, *heads[3:], out, out.stride(0), out.stride(1), tokens, padded // TILE, channels**-0.5 * LOG2_E,
        H=count, C=channels, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
