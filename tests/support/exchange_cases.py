"""What each rank's process checks of the sums and moves between GPUs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gpu_ranks import device_of, exchange_of
from ranks import logits_of, prepared
from worker_settings import worker_config

from sempre.ipc.errors import EngineUnhealthy
from sempre.kernels.exchange.contract import Cut, Norm
from sempre.kernels.linear import GpuLinearWeight, linear
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.parallel import parallel_of

HAS_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
# rows, inputs of a rank, columns; tables: rows, columns, tokens
SHAPES = [(1, 16, 48), (5, 32, 33)]
TABLES = [(67, 40, 5), (5, 24, 1)]
if HAS_GPU:
    SHAPES += [(1, 2048, 4096), (3, 1024, 1000), (64, 2048, 4096), (257, 128, 5120), (1000, 256, 2049)]
    TABLES += [(151936, 4096, 64), (1001, 640, 300)]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _factors(*shape: int, seed: int) -> torch.Tensor:
    """Of a matmul; in the interpreter, whose order of additions may be any, small integers."""
    if HAS_GPU:
        return _random(*shape, seed=seed)
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DTYPE)


def _inputs(rows: int, depth: int, columns: int, rank: int) -> torch.Tensor:
    """Of a rank's matmul; in the interpreter its result, as any matmul of a process may have other bits there."""
    return _random(rows, depth, seed=40 + rank) if HAS_GPU else _random(rows, columns, seed=40 + rank).float() / 3


def _matmul(x: torch.Tensor, w: GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
    return linear(x, GpuLinearWeight(w.weight, None), out) if HAS_GPU else out.copy_(x)


def _weights(rank: int, size: int, depth: int, columns: int, *, has_bias: bool) -> list[GpuLinearWeight]:
    device = device_of(rank)
    bias = _random(columns, seed=9).to(device) if has_bias else None
    scale = _random(columns, seed=10, dtype=torch.float32).to(device) if has_bias else None
    return [
        GpuLinearWeight(_random(columns, depth, seed=20 + other).to(device), bias, scale=scale) for other in range(size)
    ]


def _tree(parts: list[torch.Tensor]) -> torch.Tensor:
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _prepare() -> None:
    """In a process of its own. Few programs in the interpreter, as each waits for its like in the other processes."""
    if HAS_GPU:
        from sempre.kernels.linear.gpu import configure

        configure()
        return
    from sempre.kernels.exchange import gpu

    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment, method-assign]
    gpu.PLACES = 2


def sums(rank: int, size: int, folder: Path) -> list[str]:
    """Which sums of this rank are not those of the reference: all rows added by all ranks, and each rank's share by
    one, which must not be seen in the bits."""
    from sempre.workers.gpu import exchange as module

    _prepare()
    module.partial_linear = _matmul  # type: ignore[assignment]
    exchange = exchange_of(folder, rank, size)
    wrong = []
    for number, shape in enumerate(SHAPES):
        for module.MOST_BYTES_ADDED_BY_ALL in (1 << 40, 0):
            exchange.begin()
            wrong += _wrong_sums(exchange, rank, size, shape, has_bias=number % 2 == 0)
    if HAS_GPU:
        torch.cuda.synchronize()
    exchange.check()
    return wrong


def _wrong_sums(exchange: object, rank: int, size: int, shape: tuple[int, int, int], *, has_bias: bool) -> list[str]:
    from sempre.kernels.norms.gpu import add_rms_norm
    from sempre.workers.gpu.exchange import GpuExchange

    assert isinstance(exchange, GpuExchange)
    (rows, depth, columns), device, wrong = shape, device_of(rank), []
    weights = _weights(rank, size, depth, columns, has_bias=has_bias)
    inputs = [_inputs(*shape, other).to(device) for other in range(size)]
    partials = [_matmul(x, w, torch.empty(rows, columns, device=device)) for x, w in zip(inputs, weights, strict=True)]
    total, own = _tree(partials), weights[rank]
    if size > 2 and torch.equal(_tree([partials[i] for i in (0, 2, 1, 3)]), total):
        wrong.append("the control: another order gives other bits")
    if own.scale is not None and own.bias is not None:
        total = total * own.scale + own.bias.float()
    expected = total.to(DTYPE)
    found = exchange.sum(inputs[rank], own, torch.full_like(expected, float("nan")))
    if not torch.equal(found, expected):
        wrong.append(f"sum of {shape}: {int((found != expected).sum())} differ")
    residual, weight = _random(rows, columns, seed=50).to(device), _random(columns, seed=51).to(device)
    expected_residual = residual.clone()
    normed = add_rms_norm(expected, expected_residual, weight, 1e-5, torch.empty_like(expected))
    out = torch.full_like(expected, float("nan"))
    exchange.sum_and_norm(inputs[rank], own, Norm(residual, weight, 1e-5), out)
    if not torch.equal(residual, expected_residual):
        wrong.append(f"residual of {shape}: {int((residual != expected_residual).sum())} differ")
    if not torch.equal(out, normed):
        wrong.append(f"norm of {shape}: {int((out != normed).sum())} differ")
    return wrong


def moves(rank: int, size: int, folder: Path) -> list[str]:
    """Which gathered rows and columns are not those of one device."""
    _prepare()
    exchange = exchange_of(folder, rank, size)
    device, wrong = device_of(rank), []
    for vocabulary, width, rows in TABLES:
        table = _factors(vocabulary, width, seed=vocabulary).to(device)
        cut = Cut(vocabulary, *divmod(vocabulary, size))
        first = rank * cut.each + min(rank, cut.more)
        own = table[first : first + cut.each + (rank < cut.more)].contiguous()
        ids = torch.arange(rows, device=device) * 7919 % vocabulary
        found = exchange.embed(ids, own, cut, torch.full((rows, width), 7.0, dtype=DTYPE, device=device))
        if not torch.equal(found, table[ids]):
            wrong.append(f"rows of {vocabulary} x {width}")
        ids = torch.tensor([-1, vocabulary, 2], device=device)
        beyond = exchange.embed(ids, own, cut, torch.empty(3, width, dtype=DTYPE, device=device))
        if not beyond[:2].isnan().all() or not torch.equal(beyond[2], table[2]):
            wrong.append("ids outside the table")
        x = _factors(rows, width, seed=3).to(device)
        scale = _random(vocabulary, seed=4, dtype=torch.float32).to(device)
        owned = scale[first : first + len(own)].contiguous()
        weight = GpuLinearWeight(own, None, scale=owned)
        out = torch.full((rows, vocabulary), float("nan"), device=device)
        expected = linear(x, GpuLinearWeight(table, None, scale=scale), torch.empty_like(out))
        if not torch.equal(exchange.gather(lambda x, out, w=weight: linear(x, w, out), x, cut, out), expected):
            wrong.append(f"columns of {vocabulary} x {width}: {int((out != expected).sum())} differ")
    if HAS_GPU:
        torch.cuda.synchronize()
    exchange.check()
    return wrong


def missing(rank: int, size: int, folder: Path) -> str:
    """Who is said to be missing, on rank 0, where no other rank comes."""
    _prepare()
    exchange = exchange_of(folder, rank, size, patience_s=1e-5)
    if rank:
        return ""
    exchange.begin()
    exchange.begin()  # over at once
    if HAS_GPU:
        torch.cuda.synchronize()
    with pytest.raises(EngineUnhealthy, match=r"rank 0: an exchange between GPUs: expected rank 1 within") as error:
        exchange.check()
    return f"{error.value.rank}"


def model_logits(rank: int, size: int, folder: Path, checkpoint: Path, token_ids: list[int]) -> torch.Tensor:
    """Of a model in float32 under `tree8`, by the GPU's kernels in the interpreter: of a prompt but for its last two
    tokens, then of each of these alone [T, V]."""
    _prepare()
    parallel = parallel_of("tree8")
    if size > 1:
        parallel = parallel_of("tree8", rank, size, devices=exchange_of(folder, rank, size))
    spec = load_spec(checkpoint)
    loaded = load_model(worker_config(checkpoint, dtype="float32"), spec, INVARIANT, parallel=parallel)
    cache, count = prepared(loaded), len(token_ids)
    cuts = [0, count - 2, count - 1, count]
    return torch.cat([logits_of(loaded.model, cache, token_ids, *ends) for ends in pairwise(cuts)])
