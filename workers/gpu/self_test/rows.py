"""Self-test of what works on one row at a time: a row alone, among others, and in fused form has the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sempre.kernels.activation import silu_and_mul
from sempre.kernels.attention import allocate_kv_cache
from sempre.kernels.embedding import embed
from sempre.kernels.norms import add_rms_norm, rms_norm
from sempre.kernels.rope import cos_sin_table
from sempre.workers.gpu.self_test.comparisons import Comparison, compare
from sempre.workers.models.decoder import DecoderWeights, rotate_and_write
from sempre.workers.models.spec import ModelSpec

ROWS = 37
LONE_ROWS = (0, 17, 36)


def check_rows(spec: ModelSpec, weights: DecoderWeights, block_size: int) -> Iterator[Comparison]:
    """Embedding, norms, activation, rotation and cache write, at this model's widths."""
    generator = torch.Generator(weights.embedding.device).manual_seed(0x5E3F)
    yield from _check_embedding(weights, generator)
    yield from _check_norms(spec, weights, generator)
    yield from _check_activation(spec, weights, generator)
    yield from _check_rotation(spec, weights, block_size, generator)


def _rows(width: int, weights: DecoderWeights, generator: torch.Generator) -> torch.Tensor:
    device = weights.embedding.device
    return torch.randn(ROWS, width, generator=generator, dtype=torch.float32, device=device).to(weights.activations)


def _check_embedding(weights: DecoderWeights, generator: torch.Generator) -> Iterator[Comparison]:
    table = weights.embedding
    token_ids = torch.randint(table.shape[0], (ROWS,), generator=generator, dtype=torch.int64, device=table.device)
    out = torch.empty(ROWS, table.shape[1], dtype=weights.activations, device=table.device)
    yield compare(
        f"embed [H={table.shape[1]}]", "against the table's rows", table[token_ids], embed(token_ids, table, out)
    )


def _check_norms(spec: ModelSpec, weights: DecoderWeights, generator: torch.Generator) -> Iterator[Comparison]:
    x = _rows(spec.hidden_size, weights, generator)
    residual = _rows(spec.hidden_size, weights, generator)
    weight, eps = weights.final_norm, spec.rms_norm_eps
    total = (residual.float() + x.float()).to(residual.dtype)
    expected = rms_norm(total, weight, eps, torch.empty_like(x))
    fused_total = residual.clone()
    fused = add_rms_norm(x, fused_total, weight, eps, torch.empty_like(x))
    operation = f"rms_norm [H={spec.hidden_size}]"
    yield compare(operation, "sum fused with the norm", total, fused_total)
    yield compare(operation, "norm fused with the sum", expected, fused)
    for row in LONE_ROWS:
        alone = rms_norm(total[row : row + 1].clone(), weight, eps, torch.empty_like(x[:1]))
        yield compare(operation, f"row {row} of {ROWS} against itself alone", alone[0], expected[row])


def _check_activation(spec: ModelSpec, weights: DecoderWeights, generator: torch.Generator) -> Iterator[Comparison]:
    gate_up = _rows(2 * spec.intermediate_size, weights, generator)
    out = gate_up.new_empty(ROWS, spec.intermediate_size)
    together = silu_and_mul(gate_up, out)
    for row in LONE_ROWS:
        alone = silu_and_mul(gate_up[row : row + 1].clone(), torch.empty_like(out[:1]))
        what = f"row {row} of {ROWS} against itself alone"
        yield compare(f"silu_and_mul [I={spec.intermediate_size}]", what, alone[0], together[row])


def _check_rotation(
    spec: ModelSpec, weights: DecoderWeights, block_size: int, generator: torch.Generator
) -> Iterator[Comparison]:
    """All tokens in one call, and one token at a time, into two caches."""
    device = weights.embedding.device
    qkv = _rows(spec.qkv_size, weights, generator)
    positions = torch.arange(ROWS, dtype=torch.int64, device=device)
    table = cos_sin_table(spec.rope, ROWS).to(device)
    blocks = -(-ROWS // block_size)
    caches = [
        allocate_kv_cache(blocks, spec.num_kv_heads, spec.head_dim, block_size, weights.dtype, device) for _ in range(2)
    ]
    rotated = [qkv.clone(), qkv.clone()]
    layer = weights.layers[0]
    for cache, rows, calls in zip(
        caches, rotated, ([slice(0, ROWS)], [slice(i, i + 1) for i in range(ROWS)]), strict=True
    ):
        for part in calls:
            rotate_and_write(
                spec,
                rows[part],
                positions[part].clone(),
                table,
                positions[part].clone(),
                cache,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
            )
    operation, what = f"rope [D={spec.head_dim}]", "one token at a time"
    queries = spec.num_heads * spec.head_dim
    yield compare(operation, f"{what}: queries", rotated[0][:, :queries], rotated[1][:, :queries])
    yield compare(operation, f"{what}: keys", caches[0].k, caches[1].k)
    yield compare(operation, f"{what}: values", caches[0].v, caches[1].v)
