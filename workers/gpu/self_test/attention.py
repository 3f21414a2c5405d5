"""Self-test of attention: one sequence as a whole prompt, in chunks, and as decoding rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from sempre.kernels.attention import AttentionWorkspace, KvCache, allocate_kv_cache, paged_attention
from sempre.kernels.rope import cos_sin_table
from sempre.workers.gpu.self_test.comparisons import Comparison, compare
from sempre.workers.models.decoder import rotate_and_write
from sempre.workers.models.spec import ModelSpec

# beyond one split of keys, with a ragged end
ATTENTION_TOKENS = 1100
ATTENTION_CUTS = (0, 1, 70, 333, 1050, ATTENTION_TOKENS)
# rows computed as decoding requests: few enough for splits in parallel
DECODED_ROWS = 40


def check_attention(
    spec: ModelSpec, dtype: torch.dtype, block_size: int, workspace: AttentionWorkspace, device: torch.device
) -> Iterator[Comparison]:
    """For each kind of window; every way in blocks of another order, decoding with and without parallel splits."""
    generator = torch.Generator(device).manual_seed(0x5E3F)
    qkv = torch.randn(ATTENTION_TOKENS, spec.qkv_size, generator=generator, dtype=torch.float32, device=device).to(
        dtype
    )
    num_blocks = -(-ATTENTION_TOKENS // block_size)
    forwards = list(range(num_blocks))
    starts = range(ATTENTION_TOKENS - DECODED_ROWS, ATTENTION_TOKENS + 1)
    for window in dict.fromkeys(spec.windows):
        case = _AttentionCase(spec, window, dtype, block_size, workspace, device)
        operation = f"attention [Hq={spec.num_heads}, Hkv={spec.num_kv_heads}, D={spec.head_dim}, window={window}]"
        whole = case.attend(qkv, forwards, (0, ATTENTION_TOKENS))
        chunked = case.attend(qkv, forwards[::-1], ATTENTION_CUTS)
        yield compare(operation, f"prompt cut at {ATTENTION_CUTS}", whole, chunked)
        decoded = case.attend(qkv, [*forwards[1:], 0], (0, *starts))
        yield compare(operation, "one row at a time", whole[-DECODED_ROWS:], decoded[-DECODED_ROWS:])
        lone = case.attend(qkv, forwards[::-1], (0, ATTENTION_TOKENS - 1, ATTENTION_TOKENS))
        yield compare(operation, "the last row alone", whole[-1:], lone[-1:])


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
        rows = torch.cat([torch.arange(a, b, dtype=torch.int64, device="cpu") for a, b in requests]).to(self.device)
        lengths = torch.tensor([end - start for start, end in requests], dtype=torch.int64, device="cpu")
        starts = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)]).to(torch.int32).to(self.device)
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
        positions = torch.arange(qkv.shape[0], dtype=torch.int64, device=device)
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=device)[positions // self.block_size]
        norm = (
            torch.linspace(0.5, 1.5, spec.head_dim, dtype=torch.float32, device=device).to(self.dtype)
            if spec.qk_norm
            else None
        )
        rotate_and_write(
            spec,
            rotated,
            positions,
            cos_sin_table(spec.rope, qkv.shape[0]).to(device),
            blocks * self.block_size + positions % self.block_size,
            cache,
            q_norm=norm,
            k_norm=norm,
        )
        return rotated
