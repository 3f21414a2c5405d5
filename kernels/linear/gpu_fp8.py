"""Matmuls of fp8 rows and fp8 weights on Hopper: persistent programs of a producer warp and two consumer warpgroups.

# T rows of x, N out features, K in features; a tile has 128 or 256 rows and `block_n` features
The producer brings 128 elements of K of both operands at a time into a ring of shared memory, by the tensor memory
accelerator. Each consumer has half of the tile's rows, in parts of 64. The tensor core sums 128 products, starting at
zero, which are then added to a float32 accumulator: while one consumer adds, the tensor core works for the other. So
every output element is what `gpu._linear` computes, in the same steps and the same order, and the bits are equal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sempre.kernels.gpu_jit import CHAINED, gluon_jit, wait_for_previous
from sempre.kernels.linear.gpu_table import Warps
from sempre.kernels.linear.weights import GpuLinearWeight

# elements of K of a stage: those after which sums are promoted
STEP = gl.constexpr(128)
# rows of a part, which one tensor-core instruction covers
ROWS = gl.constexpr(64)
# tiles of rows that are computed side by side, so that they read the same weights
GROUPED = gl.constexpr(16)
# their names differ between releases of Triton
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon_jit()
def _tile_at(index: Any, tiles_t: Any, tiles_n: Any) -> Any:
    """The first row and column, in tiles, of the tile that is computed as number `index`."""
    group = index // (GROUPED * tiles_n)
    rest = index % (GROUPED * tiles_n)
    size = gl.minimum(tiles_t - group * GROUPED, GROUPED)
    return group * GROUPED + rest % size, rest // size


@gluon_jit()
def _produce(
    x_desc: Any,
    w_desc: Any,
    x_ring: Any,
    w_ring: Any,
    full: Any,
    empty: Any,
    tiles_t: Any,
    tiles_n: Any,
    K: Any,
    STAGES: gl.constexpr,
) -> None:
    BYTES: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    BT: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    step = 0
    for index in range(gl.program_id(0), tiles_t * tiles_n, gl.num_programs(0)):
        t, n = _tile_at(index, tiles_t, tiles_n)
        for start in range(0, K, STEP):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            load_tile(x_desc, [t * BT, start], full.index(stage), x_ring.index(stage))
            load_tile(w_desc, [n * BN, start], full.index(stage), w_ring.index(stage))
            step += 1


@gluon_jit()
def _finish(
    acc: Any,
    first: Any,
    n: Any,
    out_desc: Any,
    own: Any,
    row_scales: Any,
    scale: Any,
    bias: Any,
    T: Any,
    N: Any,
    HAS_BIAS: gl.constexpr,
) -> None:
    """Scale a part, add the bias, round and store it; rows and columns past the end are not stored."""
    ACC: gl.constexpr = acc.type.layout
    t_in = first + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    n_in = n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    acc = acc * gl.load(row_scales + t_in, mask=t_in < T, other=0.0)[:, None]
    acc = acc * gl.load(scale + n_in, mask=n_in < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc = acc + gl.load(bias + n_in, mask=n_in < N, other=0.0).to(gl.float32)[None, :]
    # what was stored before has left the shared memory
    tma.store_wait(pendings=0)
    own.store(acc.to(out_desc.dtype))
    fence_async_shared()
    store_tile(out_desc, [first, n], own)


@gluon_jit()
def _consume(
    C: gl.constexpr,
    out_desc: Any,
    x_ring: Any,
    w_ring: Any,
    outs: Any,
    full: Any,
    empty: Any,
    row_scales: Any,
    scale: Any,
    bias: Any,
    tiles_t: Any,
    tiles_n: Any,
    T: Any,
    N: Any,
    K: Any,
    PARTS: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
) -> None:
    """Computes PARTS parts of 64 rows of every tile, from row 64 PARTS C on."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    none = gl.zeros([ROWS, BN], gl.float32, ACC)
    own = outs.index(C)
    step = 0
    for index in range(gl.program_id(0), tiles_t * tiles_n, gl.num_programs(0)):
        t, n = _tile_at(index, tiles_t, tiles_n)
        acc = gl.zeros([ROWS, BN], gl.float32, ACC)
        last = gl.zeros([ROWS, BN], gl.float32, ACC)
        for _start in range(0, K, STEP):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            w = w_ring.index(stage).permute((1, 0))
            x = x_ring.index(stage).slice(C * PARTS * ROWS, ROWS)
            part = warpgroup_mma(x, w, none, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            if PARTS == 2:
                acc = acc + part
                x = x_ring.index(stage).slice((C * PARTS + 1) * ROWS, ROWS)
                part = warpgroup_mma(x, w, none, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index(stage))
                last = last + part
            else:
                mbarrier.arrive(empty.index(stage))
                acc = acc + part
            step += 1
        first = (t * 2 + C) * PARTS * ROWS
        _finish(acc, first, n * BN, out_desc, own, row_scales, scale, bias, T, N, HAS_BIAS)
        if PARTS == 2:
            _finish(last, first + ROWS, n * BN, out_desc, own, row_scales, scale, bias, T, N, HAS_BIAS)
    tma.store_wait(pendings=0)


@gluon_jit(runtime=("T",))
def _fp8_linear(
    x_desc: Any,
    w_desc: Any,
    out_desc: Any,
    row_scales: Any,
    scale: Any,
    bias: Any,
    T: Any,
    N: Any,
    K: Any,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
) -> None:
    """out[t, n] = (sum over k of x[t, k] w[n, k]) * row_scales[t] * scale[n] + bias[n]."""
    BT: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BT, STEP], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, STEP], w_desc.layout)
    outs = gl.allocate_shared_memory(out_desc.dtype, [2, ROWS, BN], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    wait_for_previous()
    tiles_t = (T + BT - 1) // BT
    tiles_n = (N + BN - 1) // BN
    gl.warp_specialize(
        [
            (_consume, (0, out_desc, x_ring, w_ring, outs, full, empty, row_scales, scale, bias, tiles_t, tiles_n,
             T, N, K, PARTS, BN, STAGES, HAS_BIAS)),
            (_consume, (1, out_desc, x_ring, w_ring, outs, full, empty, row_scales, scale, bias, tiles_t, tiles_n,
             T, N, K, PARTS, BN, STAGES, HAS_BIAS)),
            (_produce, (x_desc, w_desc, x_ring, w_ring, full, empty, tiles_t, tiles_n, K, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _described(tensor: torch.Tensor, block: list[int], dtype: Any) -> Any:
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def run_warps(
    x: torch.Tensor, row_scales: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor, warps: Warps
) -> torch.Tensor:
    """The linear layer of fp8 x [T, K] with its scales [T]; see the facade."""
    (rows, depth), columns = x.shape, w.out_features
    tiles = triton.cdiv(rows, warps.block_t) * triton.cdiv(columns, warps.block_n)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _fp8_linear[(min(programs, tiles),)](
        _described(x, [warps.block_t, 128], gl.float8e4nv),
        _described(w.weight, [warps.block_n, 128], gl.float8e4nv),
        _described(out, [64, warps.block_n], GLUON_DTYPES[out.dtype]),
        row_scales,
        w.scale,
        w.bias,
        rows,
        columns,
        depth,
        PARTS=warps.block_t // 128,
        STAGES=warps.num_stages if out.dtype != torch.float32 else warps.num_stages - 1,
        HAS_BIAS=w.bias is not None,
        num_warps=4,
        **CHAINED,
    )
    return out
