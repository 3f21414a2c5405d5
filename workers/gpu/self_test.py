"""Start-up self-test on a GPU: for this model's shapes, each kernel that may be chosen gives the bits of a reference.

A product kernel that disagrees is left out of the choice for its weight; the fingerprint names it. Anything else that
disagrees with itself raises InvarianceError, and the worker does not serve. Nothing here draws from the global
generators.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from sempre.ipc.errors import ConfigError, InvarianceError
from sempre.kernels.attention import AttentionWorkspace, KvCache, allocate_kv_cache, paged_attention
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.linear.gpu_check import disagreeing, disagreeing_fp8
from sempre.kernels.linear.gpu_fp8 import FIRST_CAPABILITY
from sempre.kernels.linear.weights import GpuLinear
from sempre.kernels.rope import cos_sin_table, rope_and_cache_write
from sempre.workers.models.numerics import Packed
from sempre.workers.models.spec import ModelSpec
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS
from sempre.workers.self_test import distinct_shapes, shape_of
from sempre.workers.weights import DecoderWeights

# beyond one split of keys, with a ragged end
ATTENTION_TOKENS = 1100
ATTENTION_CUTS = (0, 1, 70, 333, 1050, ATTENTION_TOKENS)
# rows computed as decoding requests: few enough for splits in parallel
DECODED_ROWS = 40

Shape = tuple[int, int, Fp8Scheme | None]


class ProductTest(NamedTuple):
    """What the products' test found."""

    weights: DecoderWeights
    """with the kernels that disagreed left out"""
    excluded: dict[str, list[str]]
    """by shape, for the fingerprint"""
    passed: int


def require_fp8(weights: DecoderWeights, device: torch.device) -> None:
    """Raise ConfigError where the GPU cannot compute with the fp8 matrices of the model."""
    capability = torch.cuda.get_device_capability(device)
    if weights.quantization is not None and capability < FIRST_CAPABILITY:
        least, found = (f"sm_{major}{minor}" for major, minor in (FIRST_CAPABILITY, capability))
        raise ConfigError(
            f"quantization: expected a GPU of {least} or later for {weights.quantization.value}, found"
            f" {torch.cuda.get_device_name(device)} ({found}). Use a checkpoint that is not quantised, or the CPU.",
            parameter="quantization",
            value=weights.quantization.value,
        )


def check_products(weights: DecoderWeights, *, max_tokens: int, max_num_seqs: int) -> ProductTest:
    """Every (N, K) of the model, at the row counts where another kernel is chosen."""
    excluded: dict[Shape, frozenset[str]] = {}
    shapes = list(distinct_shapes(weights))
    for _, packed in shapes:
        assert isinstance(packed, GpuLinear)
        is_head = packed is weights.lm_head
        max_rows = max(max_num_seqs, PROMPT_LOGPROB_ROWS) if is_head else max_tokens
        if packed.scheme is None:
            wrong = disagreeing(packed, max_rows=max_rows)
        else:
            wrong = disagreeing_fp8(packed, weights.dtype, max_rows=max_rows)
        if wrong:
            excluded[shape_of(packed)] = frozenset(wrong)
    torch.cuda.empty_cache()
    names = {_name(shape): sorted(choices) for shape, choices in excluded.items()}
    return ProductTest(_without(weights, excluded) if excluded else weights, names, len(shapes))


def _name(shape: Shape) -> str:
    columns, depth, scheme = shape
    return f"N={columns},K={depth}" + (f",{scheme.value}" if scheme is not None else "")


def _without(weights: DecoderWeights, excluded: dict[Shape, frozenset[str]]) -> DecoderWeights:
    def reduced(packed: Packed) -> GpuLinear:
        assert isinstance(packed, GpuLinear)
        return replace(packed, excluded=excluded.get(shape_of(packed), frozenset()))

    layers = tuple(
        replace(
            layer,
            qkv=reduced(layer.qkv),
            o=reduced(layer.o),
            gate_up=reduced(layer.gate_up),
            down=reduced(layer.down),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers, lm_head=reduced(weights.lm_head))


def check_attention(
    spec: ModelSpec, dtype: torch.dtype, block_size: int, workspace: AttentionWorkspace, device: torch.device
) -> int:
    """One sequence as a whole prompt, in chunks, and as decoding rows, each in blocks of another order.

    Returns the number of window kinds tested. Raises InvarianceError.
    """
    generator = torch.Generator(device).manual_seed(0x5E3F)
    qkv = torch.randn(ATTENTION_TOKENS, spec.qkv_size, generator=generator, device=device).to(dtype)
    num_blocks = -(-ATTENTION_TOKENS // block_size)
    forwards = list(range(num_blocks))
    starts = range(ATTENTION_TOKENS - DECODED_ROWS, ATTENTION_TOKENS + 1)
    windows = tuple(dict.fromkeys(spec.windows))
    for window in windows:
        case = _AttentionCase(spec, window, dtype, block_size, workspace, device)
        whole = case.attend(qkv, forwards, (0, ATTENTION_TOKENS))
        chunked = case.attend(qkv, forwards[::-1], ATTENTION_CUTS)
        _require_equal(case, f"prompt cut at {ATTENTION_CUTS}", whole, chunked)
        decoded = case.attend(qkv, [*forwards[1:], 0], (0, *starts))
        _require_equal(case, "one row at a time", whole[-DECODED_ROWS:], decoded[-DECODED_ROWS:])
    return len(windows)


class _AttentionCase(NamedTuple):
    spec: ModelSpec
    window: int | None
    dtype: torch.dtype
    block_size: int
    workspace: AttentionWorkspace
    device: torch.device

    def attend(self, qkv: torch.Tensor, block_ids: list[int], cuts: tuple[int, ...]) -> torch.Tensor:
        """Rotation and cache write of the whole sequence, then attention of the chunks between `cuts`: those of
        several rows as requests of one batch, those of one row as the requests of a decode step."""
        spec, device = self.spec, self.device
        cache = allocate_kv_cache(len(block_ids), spec.num_kv_heads, spec.head_dim, self.block_size, self.dtype, device)
        rotated = self._write(qkv, block_ids, cache)
        out = torch.empty(qkv.shape[0], spec.num_heads * spec.head_dim, dtype=self.dtype, device=device)
        table = torch.tensor(block_ids, dtype=torch.int32, device=device)
        chunks = [(start, end) for start, end in pairwise(cuts) if end - start > 1]
        single = [start for start, end in pairwise(cuts) if end - start == 1]
        for part in (chunks, [(start, start + 1) for start in single]):
            if part:
                self._attend_requests(rotated, cache, table, part, out)
        return out

    def _attend_requests(
        self,
        rotated: torch.Tensor,
        cache: KvCache,
        table: torch.Tensor,
        requests: list[tuple[int, int]],
        out: torch.Tensor,
    ) -> None:
        spec = self.spec
        rows = torch.cat([torch.arange(start, end) for start, end in requests]).to(self.device)
        lengths = torch.tensor([end - start for start, end in requests])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32).to(self.device)
        contexts = torch.tensor([end for _, end in requests], dtype=torch.int32, device=self.device)
        part = torch.empty(rows.numel(), out.shape[1], dtype=out.dtype, device=self.device)
        paged_attention(
            rotated.index_select(0, rows),
            cache,
            table.expand(len(requests), -1).contiguous(),
            starts,
            contexts,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
            window=self.window,
            out=part,
            max_query_len=int(lengths.max()),
            max_context_len=requests[-1][1],
            workspace=self.workspace,
        )
        out.index_copy_(0, rows, part)

    def _write(self, qkv: torch.Tensor, block_ids: list[int], cache: KvCache) -> torch.Tensor:
        spec, device = self.spec, self.device
        rotated = qkv.clone()
        positions = torch.arange(qkv.shape[0], device=device)
        blocks = torch.tensor(block_ids, device=device)[positions // self.block_size]
        norm = torch.linspace(0.5, 1.5, spec.head_dim, device=device).to(self.dtype) if spec.qk_norm else None
        rope_and_cache_write(
            rotated,
            positions,
            cos_sin_table(spec.rope, qkv.shape[0]).to(device),
            blocks * self.block_size + positions % self.block_size,
            cache.k,
            cache.v,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            q_norm=norm,
            k_norm=norm,
            eps=spec.rms_norm_eps,
        )
        return rotated


def _require_equal(case: _AttentionCase, what: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    different = int((expected != found).sum())
    if different:
        spec = case.spec
        operation = f"attention [Hq={spec.num_heads}, Hkv={spec.num_kv_heads}, D={spec.head_dim}, window={case.window}]"
        raise InvarianceError(
            f"self-test: {operation}: {what}: expected the bits of the whole prompt, found {different} of"
            f" {expected.numel()} elements different. The guarantee does not hold on this GPU with these library"
            " versions; please report the operation and `sempre collect-env`.",
            operation=operation,
        )
