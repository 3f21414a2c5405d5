"""GPU kernels on the CPU by Triton's interpreter: indexing, masks, accuracy, and equal results for equal rows."""

from __future__ import annotations

import kernel_reference as reference
import kv_parts_cases
import pytest
import torch
from paged_sequences import PagedSequences

from sempre.kernels.activation import Activation
from sempre.kernels.attention import KvCache
from sempre.kernels.linear import GpuLinearWeight

DTYPES = [torch.float16, torch.float32]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(96, 70), (64, 1), (128, 64)])
def test_linear(depth: int, columns: int, dtype: torch.dtype) -> None:
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import REFERENCE, Tile

    x = _random(37, depth, dtype=dtype)
    w = GpuLinearWeight(_random(columns, depth, dtype=dtype), _random(columns, dtype=dtype))
    expected = reference.linear(x, w.weight, w.bias)
    for tile in (REFERENCE, Tile(16, 16, 64, 1, 3), Tile(32, 32, 32, 2, 2)):
        out = gpu.run_tile(x, w, torch.full((37, columns), float("nan")), tile)
        assert (out - expected).norm() / expected.norm() < 1e-6
    out = gpu.linear(x, w, torch.full((37, columns), float("nan"), dtype=dtype))
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    assert torch.equal(gpu.linear(x[5:6].contiguous(), w, torch.empty(1, columns, dtype=dtype))[0], out[5])


@pytest.mark.parametrize("activation", list(Activation), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_activation(dtype: torch.dtype, activation: Activation) -> None:
    from sempre.kernels.activation import gpu as activation_gpu
    from sempre.kernels.linear import gpu

    x, w = _random(20, 96, dtype=dtype), GpuLinearWeight(_random(70, 96, dtype=dtype), None)
    out = torch.full((20, 35), float("nan"), dtype=dtype)
    gpu.gated_linear(x, w, torch.empty(20, 70, dtype=dtype), out, activation)
    product = gpu.linear(x, w, torch.empty(20, 70, dtype=dtype))
    assert torch.equal(out, activation_gpu.activate_and_mul(product, torch.empty_like(out), activation))
    if activation is Activation.GELU:
        return
    expected = {Activation.SILU: reference.silu_and_mul, Activation.CLAMPED: reference.clamped_and_mul}[activation](
        product
    )
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]


def test_the_fused_matmul_has_the_bits_of_the_two_in_turn() -> None:
    """With sums that float32 holds exactly in any order, and float16 does not."""
    from sempre.kernels.activation import gpu as activation_gpu
    from sempre.kernels.linear import gpu
    from sempre.kernels.linear.gpu_table import Tile

    generator = torch.Generator().manual_seed(3)
    x, weight = (
        torch.randint(-64, 65, (rows, 96), generator=generator) / scale for rows, scale in ((20, 64), (70, 256))
    )
    w = GpuLinearWeight(weight.half(), None)
    product = gpu.linear(x.half(), w, torch.empty(20, 70, dtype=torch.float16))
    assert not torch.equal(product.float(), x @ weight.T)
    expected = activation_gpu.silu_and_mul(product, torch.empty(20, 35, dtype=torch.float16))
    for tile in (Tile(16, 16, 64, 1, 3), Tile(32, 32, 32, 2, 2)):
        out = torch.full((20, 35), float("nan"), dtype=torch.float16)
        assert torch.equal(gpu.run_fused_tile(x.half(), w, out, tile), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_soft_caps(dtype: torch.dtype) -> None:
    from sempre.kernels.activation import gpu

    gate_up = _random(5, 140, dtype=dtype) * 3.0
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    out = gpu.gelu_and_mul(gate_up, torch.full((5, 70), float("nan"), dtype=dtype))
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    x = _random(5, 301, dtype=torch.float32) * torch.logspace(-6, 6, 5)[:, None]
    expected = 2.5 * torch.tanh(x.double() / 2.5)
    assert ((gpu.soft_cap(x, 2.5) - expected) / expected).abs().max() < 1e-6


def test_clamped_activation() -> None:
    """NaN in either half stays one."""
    from sempre.kernels.activation import gpu

    gate_up = _random(7, 140, dtype=torch.float32) * 8.0
    gate_up[3, 2], gate_up[4, 73] = float("nan"), float("nan")
    out = gpu.activate_and_mul(gate_up, torch.full((7, 70), 1.0), Activation.CLAMPED)
    expected = reference.clamped_and_mul(gate_up)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().nonzero().tolist() == [[3, 2], [4, 3]]
    assert (out - expected).nan_to_num().norm() / expected.nan_to_num().norm() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_embedding(dtype: torch.dtype) -> None:
    from sempre.kernels.embedding import gpu as embedding_gpu
    from sempre.kernels.norms import gpu as norms_gpu

    x, residual, weight = (_random(*shape, dtype=dtype) for shape in ((5, 576), (6, 576), (576,)))
    residual = residual[:5].clone()
    total = residual.clone()
    assert dtype == torch.float32 or not torch.equal((total + x).float(), total.float() + x.float()), (
        "no sum is rounded"
    )
    out = norms_gpu.add_rms_norm(x, total, weight, 1e-5, torch.full_like(x, float("nan")))
    assert torch.equal(total, residual + x)
    assert torch.equal(out, norms_gpu.rms_norm(total, weight, 1e-5, torch.empty_like(x)))
    expected = reference.rms_norm(total, weight, 1e-5)
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    parts = torch.cat([x, x[:, :96], x[:, :32]], dim=1)
    normed = norms_gpu.rms_norm_of_parts(parts.clone(), weight, weight[:96].contiguous(), 1e-5)
    for columns, w in ((slice(576), weight), (slice(576, 672), weight[:96])):
        expected = reference.rms_norm(parts[:, columns], w, 1e-5)
        assert (normed[:, columns] - expected).norm() / expected.norm() < ROUNDING[dtype]
    assert torch.equal(normed[:, 672:], parts[:, 672:])
    table, ids = _random(10, 100, dtype=dtype), torch.tensor([3, 9, 10, -1])
    rows = embedding_gpu.embed(ids, table, torch.empty(4, 100, dtype=dtype))
    assert torch.equal(rows[:2], table[ids[:2]])
    assert rows[2:].isnan().all()


@pytest.mark.parametrize(
    ("heads", "dtype", "window", "block", "soft_cap", "with_sinks"),
    [
        ((4, 2, 64), torch.float16, None, 16, None, False),
        ((3, 1, 80), torch.float32, 37, 32, None, False),
        ((2, 1, 16), torch.float32, 37, 32, 1.5, False),
        ((2, 1, 16), torch.float16, None, 64, 1.5, False),
        ((4, 2, 16), torch.float32, None, 16, None, True),
        ((4, 1, 16), torch.float16, 37, 64, None, True),
    ],
    ids=str,
)
def test_attention(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
    block: int,
    soft_cap: float | None,
    with_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sempre.kernels.attention import gpu

    # splits of two tiles of keys, so that a short sequence has two
    monkeypatch.setattr(gpu, "SPLIT", 128)
    lengths = (131, 1, 20)
    settings = {"block": block, "window": window, "with_norm": heads[0] != 3, "soft_cap": soft_cap}
    sequences = PagedSequences(lengths, *heads, dtype, "cpu", with_sinks=with_sinks, **settings)
    cache = sequences.empty_cache()
    whole = sequences.step(cache, [(s, 0, n) for s, n in enumerate(lengths)])
    for s in range(3):
        expected = sequences.expected(s)
        assert (whole[s] - expected).norm() / expected.norm() < ROUNDING[dtype]
    parts = [(0, 106, 131), (0, 130, 131), (1, 0, 1), (2, 15, 20)]
    for options in ({"workspace": sequences.workspace(), "padding": 2}, {"slack": 9}):
        for found, (s, a, b) in zip(sequences.step(cache, parts, **options), parts, strict=True):
            torch.testing.assert_close(found, whole[s][a:b], rtol=0, atol=5 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", kv_parts_cases.HEADS, ids=str)
def test_rows_of_keys_that_are_values_and_of_queries_only(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    from sempre.kernels.attention import gpu as attention_gpu
    from sempre.kernels.rope import gpu as rope_gpu

    def allocate(*sizes: object) -> KvCache:
        return attention_gpu.allocate_kv_cache(*sizes, torch.device("cpu"))

    kernels = kv_parts_cases.Kernels(rope_gpu.rope_and_cache_write, attention_gpu.paged_attention, allocate, "cpu")
    kv_parts_cases.check_kv_parts(kernels, heads, dtype, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_two_tensors(dtype: torch.dtype) -> None:
    from sempre.kernels.activation import gpu

    gate_up, wide = _random(5, 140, dtype=dtype) * 3.0, _random(5, 300, dtype=dtype)
    gate = gate_up[:, :70].contiguous()
    wide[:, 100:170] = gate_up[:, 70:]
    expected = gpu.gelu_and_mul(gate_up, torch.empty(5, 70, dtype=dtype))
    assert torch.equal(gpu.gelu_mul(gate, wide[:, 100:170], torch.empty(5, 70, dtype=dtype)), expected)
