"""Start-up self-test: on this machine, for this model's shapes, a row's bits do not depend on the other rows.

Fails closed: the first operation that disagrees with itself raises InvarianceError, and the worker does not serve.
Matrix products are tested with random weights of each distinct (N, K, storage) at many row counts M, on the last
`MAX_COLUMNS` columns' worth of N for large matrices (columns are independent; the remainder of N is kept), and the
model's own packed weight of that shape in full at one M. Nothing here draws from the global generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from sempre.ipc.errors import InvarianceError
from sempre.kernels.activation import silu_and_mul
from sempre.kernels.attention import allocate_kv_cache, paged_attention
from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.norms import add_rms_norm, rms_norm
from sempre.kernels.rope import cos_sin_table
from sempre.workers.models.decoder import DecoderWeights, rotate_and_write
from sempre.workers.models.numerics import LinearKernel, Packed
from sempre.workers.models.spec import ModelSpec
from sempre.workers.tensor_source import CPU

ROW_COUNTS = (2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 33, 64, 100, 128, 241, 256)
DISTINCT_ROWS = 32
MAX_COLUMNS = 256
FULL_SIZE_ROWS = 5

# crosses two key tiles of 64, with a ragged end
ATTENTION_TOKENS = 150
ATTENTION_CUTS = (0, 1, 70, 134, ATTENTION_TOKENS)


def self_test(
    spec: ModelSpec, weights: DecoderWeights, product: LinearKernel, *, block_size: int, max_tokens: int
) -> dict[str, int]:
    """Run all tests; returns how many comparisons each operation passed. Raises InvarianceError."""
    generator = torch.Generator().manual_seed(0x5E3F)
    row_counts = tuple(m for m in ROW_COUNTS if m <= max_tokens)
    passed = {"linear": 0, "rms_norm": 0, "silu_and_mul": 0, "attention": 0}
    for name, packed in distinct_shapes(weights):
        passed["linear"] += check_linear(name, packed, product, weights.storage, row_counts, generator)
    passed["rms_norm"] = _check_norms(spec, row_counts, generator)
    passed["silu_and_mul"] = _check_activation(spec, row_counts, generator)
    for window in dict.fromkeys(spec.windows):
        _check_attention(spec, window, weights.dtype, block_size, generator)
        passed["attention"] += 1
    return passed


def distinct_shapes(weights: DecoderWeights) -> Iterator[tuple[str, Packed]]:
    """The first matrix of each distinct (N, K) and fp8 scheme, with its name."""
    seen: set[tuple[int, int, Fp8Scheme | None]] = set()
    for layer in weights.layers:
        for name, packed in (("qkv", layer.qkv), ("o", layer.o), ("gate_up", layer.gate_up), ("down", layer.down)):
            if shape_of(packed) not in seen:
                seen.add(shape_of(packed))
                yield name, packed
    if shape_of(weights.lm_head) not in seen:
        yield "lm_head", weights.lm_head


def shape_of(packed: Packed) -> tuple[int, int, Fp8Scheme | None]:
    """Matrices of equal shape and scheme are multiplied by the same kernels."""
    return packed.out_features, packed.in_features, packed.scheme


def check_linear(
    name: str,
    packed: Packed,
    product: LinearKernel,
    storage: torch.dtype,
    row_counts: tuple[int, ...],
    generator: torch.Generator,
) -> int:
    """Compare rows computed one at a time with the same rows in batches; returns the number of comparisons."""
    depth, columns = packed.in_features, packed.out_features
    tested = columns if columns <= MAX_COLUMNS else MAX_COLUMNS - (-columns % 32)
    stored_as = packed.scheme.value if packed.scheme is not None else str(storage).removeprefix("torch.")
    operation = f"linear {name} [N={columns}, K={depth}, {stored_as}]"
    small = _random_weight(tested, depth, packed.scheme, product, storage, generator)
    x = torch.randn(DISTINCT_ROWS, depth, generator=generator, dtype=torch.float32, device=CPU)
    compare_rows(operation, x, tested, lambda rows, out: product.apply(rows, small, out), row_counts)
    compare_rows(operation, x, columns, lambda rows, out: product.apply(rows, packed, out), (FULL_SIZE_ROWS,))
    return len(row_counts) + 1


def _random_weight(
    columns: int,
    depth: int,
    scheme: Fp8Scheme | None,
    product: LinearKernel,
    storage: torch.dtype,
    generator: torch.Generator,
) -> Packed:
    weight = torch.randn(columns, depth, generator=generator, dtype=torch.float32, device=CPU)
    if scheme is None:
        return product.pack(weight.to(storage), None)
    return product.pack_fp8(*quantize_channels(weight), None, scheme)


def compare_rows(
    operation: str,
    x: torch.Tensor,
    width: int,
    apply: Callable[[torch.Tensor, torch.Tensor], object],
    row_counts: tuple[int, ...],
) -> None:
    """`apply(rows [M, K], out [M, width])` must give each row of `x` the bits it gives the row alone, at every M and
    place. Raises InvarianceError."""
    distinct = min(x.shape[0], max(row_counts, default=0))
    alone = torch.empty(distinct, width, dtype=torch.float32, device=CPU)
    for row in range(distinct):
        apply(x[row : row + 1], alone[row : row + 1])
    for count in row_counts:
        # another start per M, so that a row meets other places and neighbours
        order = (torch.arange(count, dtype=torch.int64, device=CPU) + count) % distinct
        out = torch.empty(count, width, dtype=torch.float32, device=CPU)
        apply(x[order].contiguous(), out)
        _require_equal(operation, f"M={count}", alone[order], out)


def _require_equal(operation: str, case: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    different = int((expected.view(torch.int32) != found.view(torch.int32)).sum())
    if different:
        raise InvarianceError(
            f"self-test: {operation}: {case}: expected the bits of rows computed alone, found {different} of"
            f" {expected.numel()} elements different. The guarantee does not hold on this machine with these library"
            " versions; please report the operation and `sempre collect-env`.",
            operation=operation,
        )


def _check_norms(spec: ModelSpec, row_counts: tuple[int, ...], generator: torch.Generator) -> int:
    width, eps = spec.hidden_size, spec.rms_norm_eps
    x = torch.randn(DISTINCT_ROWS, width, generator=generator, dtype=torch.float32, device=CPU)
    weight = torch.randn(width, generator=generator, dtype=torch.float32, device=CPU)

    def added(rows: torch.Tensor, out: torch.Tensor) -> None:
        add_rms_norm(rows, rows * 0.5, weight, eps, out)

    compare_rows(f"rms_norm [H={width}]", x, width, lambda rows, out: rms_norm(rows, weight, eps, out), row_counts)
    compare_rows(f"add_rms_norm [H={width}]", x, width, added, row_counts)
    return 2 * len(row_counts)


def _check_activation(spec: ModelSpec, row_counts: tuple[int, ...], generator: torch.Generator) -> int:
    width = spec.intermediate_size
    x = torch.randn(DISTINCT_ROWS, 2 * width, generator=generator, dtype=torch.float32, device=CPU)
    compare_rows(f"silu_and_mul [I={width}]", x, width, silu_and_mul, row_counts)
    return len(row_counts)


def _check_attention(
    spec: ModelSpec, window: int | None, dtype: torch.dtype, block_size: int, generator: torch.Generator
) -> None:
    """One sequence as a whole prompt, in chunks, and as decode rows side by side, each in blocks of another order."""
    qkv = torch.randn(ATTENTION_TOKENS, spec.qkv_size, generator=generator, dtype=torch.float32, device=CPU)
    operation = (
        f"attention [Hq={spec.num_heads}, Hkv={spec.num_kv_heads}, D={spec.head_dim}, window={window},"
        f" {str(dtype).removeprefix('torch.')}]"
    )
    num_blocks = -(-ATTENTION_TOKENS // block_size)
    whole = _attend(spec, window, dtype, qkv, list(range(num_blocks)), block_size, (0, ATTENTION_TOKENS))
    backwards = list(range(num_blocks - 1, -1, -1))
    chunked = _attend(spec, window, dtype, qkv, backwards, block_size, ATTENTION_CUTS)
    _require_equal(operation, f"prompt cut at {ATTENTION_CUTS}", whole, chunked)
    rotated = [*range(1, num_blocks), 0]
    decoded = _attend(spec, window, dtype, qkv, rotated, block_size, tuple(range(ATTENTION_TOKENS + 1)))
    _require_equal(operation, "one row at a time", whole, decoded)


def _attend(
    spec: ModelSpec,
    window: int | None,
    dtype: torch.dtype,
    qkv: torch.Tensor,
    block_ids: list[int],
    block_size: int,
    cuts: tuple[int, ...],
) -> torch.Tensor:
    """Attention of one sequence computed in the chunks between `cuts`: rotation and cache write per chunk, then all
    chunks as the requests of one batch."""
    cache = allocate_kv_cache(len(block_ids), spec.num_kv_heads, spec.head_dim, block_size, dtype)
    table = cos_sin_table(spec.rope, ATTENTION_TOKENS)
    rotated = qkv.clone()
    positions = torch.arange(ATTENTION_TOKENS, dtype=torch.int64, device=CPU)
    slots = (
        torch.tensor(block_ids, dtype=torch.int64, device=CPU)[positions // block_size] * block_size
        + positions % block_size
    )
    norm = torch.linspace(0.5, 1.5, spec.head_dim, dtype=torch.float32, device=CPU) if spec.qk_norm else None
    for start, end in pairwise(cuts):
        part = slice(start, end)
        rotate_and_write(spec, rotated[part], positions[part], table, slots[part], cache, q_norm=norm, k_norm=norm)
    out = torch.empty(ATTENTION_TOKENS, spec.num_heads * spec.head_dim, dtype=torch.float32, device=CPU)
    paged_attention(
        rotated,
        cache,
        torch.tensor(block_ids, dtype=torch.int32, device=CPU).expand(len(cuts) - 1, -1).contiguous(),
        torch.tensor(cuts, dtype=torch.int32, device=CPU),
        torch.tensor(cuts[1:], dtype=torch.int32, device=CPU),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5,
        window=window,
        out=out,
    )
    return out
