"""Decode steps whose requests begin with the same cache blocks, for tests of the GPU's attention on any device.

# R requests, S leading splits, Hq query heads, Hkv key heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sempre.kernels.attention import HeadLayout, KvCache, PagedBatch, ScoreParams
from sempre.kernels.attention.shared_prefixes import PrefixArrays, group_requests, most_shared_splits

# of each request: what it shares of its leading splits, and how many keys it has after them
Requests = list[tuple[str, int]]


@dataclass
class SharedStep:
    """One row of each request. A letter names the content of a split: "aab" and "aac" share two splits."""

    requests: Requests
    heads: HeadLayout
    dtype: torch.dtype
    device: str
    split: int
    block: int = 64
    soft_cap: float | None = None
    with_sinks: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.requests) * 100 + self.heads.head_dim)
        per_split = self.split // self.block
        self.lens = [len(prefix) * self.split + rest for prefix, rest in self.requests]
        width = -(-max(self.lens) // self.block)
        known: dict[str, list[int]] = {}
        taken = 0

        def fresh(count: int) -> list[int]:
            nonlocal taken
            taken += count
            return list(range(taken - count, taken))

        tables = []
        for prefix, rest in self.requests:
            keys = [prefix[: at + 1] for at in range(len(prefix))]
            blocks = [block for key in keys for block in known.setdefault(key, fresh(per_split))]
            blocks += fresh(-(-rest // self.block))
            tables.append(blocks + [-(1 << 20)] * (width - len(blocks)))
        order = torch.randperm(taken, generator=generator).to(torch.int32)
        self.tables = torch.tensor(tables, dtype=torch.int32)
        self.tables = torch.where(self.tables < 0, self.tables, order[self.tables.clamp(min=0)])
        names = sorted(known)
        depth = max(len(prefix) for prefix, _ in self.requests)
        self.split_ids = np.zeros((len(tables), depth), np.int32)
        for row, (prefix, _) in enumerate(self.requests):
            for at in range(len(prefix)):
                self.split_ids[row, at] = 1 + names.index(prefix[: at + 1])
        shape = (taken, self.heads.num_kv_heads, self.block, self.heads.head_dim)
        self.cache = KvCache(
            *(torch.randn(shape, generator=generator).to(self.dtype).to(self.device) for _ in range(2))
        )
        qkv = torch.randn(len(tables), self.heads.qkv_width, generator=generator)
        self.qkv = qkv.to(self.dtype).to(self.device)
        sinks = torch.linspace(-1.0, 3.0, self.heads.num_heads).to(self.device) if self.with_sinks else None
        self.scores = ScoreParams(self.heads.head_dim**-0.5, self.window, self.soft_cap, sinks)

    def arrays(self, *, padding: int = 0, least_saved: int = 1) -> PrefixArrays | None:
        num_rows = len(self.requests) + padding
        width = most_shared_splits(num_rows, self.split_ids.shape[1])
        return group_requests(self.split_ids[:, :width], num_rows, least_saved=least_saved)

    def batch(
        self,
        prefixes: PrefixArrays | None,
        *,
        padding: int = 0,
        stride: int = 0,
        slack: int = 0,
        counts: Sequence[int] = (),
    ) -> PagedBatch:
        """`padding` requests follow; `stride`: splits that the workspace has room for, at least those shared;
        `counts`: rows of each request, else one."""
        rows = torch.tensor([0, *(counts or [1] * len(self.requests)), *[int(not counts)] * padding])
        tables = torch.cat([self.tables, torch.zeros(padding, self.tables.shape[1], dtype=torch.int32)])
        shared = None
        if prefixes is not None:
            shared = prefixes.on_device(torch.device(self.device), max(stride, self.split_ids.shape[1]))
        return PagedBatch(
            tables.to(self.device),
            rows.cumsum(0).to(torch.int32).to(self.device),
            torch.tensor([*self.lens, *[0] * padding], dtype=torch.int32, device=self.device),
            max_query_len=int(rows.max()),
            max_context_len=max(self.lens) + slack,
            prefixes=shared,
        )

    def attend(self, batch: PagedBatch) -> torch.Tensor:
        """[T, Hq D], of all keys read anew, or with the batch's prefixes."""
        from sempre.kernels.attention import gpu, gpu_prefix

        rows = int(batch.query_starts[-1])
        qkv = self.qkv.repeat(-(-rows // len(self.qkv)), 1)[:rows].contiguous()
        out = torch.full((rows, self.heads.num_heads * self.heads.head_dim), float("nan"), device=self.device).to(
            self.dtype
        )
        stride = 1 if batch.prefixes is None else batch.prefixes.max_splits
        needed = -(-stride * batch.num_requests // gpu.MAX_SPLIT_TOKENS) * self.split
        workspace = gpu.allocate_attention_workspace(
            self.heads.num_heads, self.heads.head_dim, max(needed, max(self.lens)), torch.device(self.device)
        )
        for scratch in (workspace.acc, workspace.m, workspace.l):
            scratch.fill_(float("nan"))
        run = gpu_prefix if gpu_prefix.can_share(batch, self.heads, self.scores, workspace) else gpu
        self.ran = run.__name__.rpartition(".")[2]
        run.paged_attention(qkv, self.cache, batch, self.heads, self.scores, out, workspace)
        return out


def check_shared_prefixes(step: SharedStep) -> None:
    """The bits are those of every request reading all its keys: with splits in turn and side by side, padding, and
    looser bounds."""
    expected = step.attend(step.batch(None))
    assert step.ran == "gpu"
    assert expected.isfinite().all()
    most_splits = -(-max(step.lens) // step.split)
    for padding, stride, slack in ((0, 0, 0), (3, 0, 5), (2, most_splits + 1, 0)):
        arrays = step.arrays(padding=padding)
        assert arrays is not None
        found = step.attend(step.batch(arrays, padding=padding, stride=stride, slack=slack))
        assert step.ran == "gpu_prefix"
        assert torch.equal(found[: len(expected)], expected), (padding, stride, slack)
        assert found[len(expected) :].isnan().all(), "padding is not written"


def check_beside_prompts(step: SharedStep) -> None:
    """The same where some requests have several rows: their own keys, though their blocks are shared, too."""
    counts = [5 if index % 3 == 1 else 1 for index in range(len(step.requests))]
    step.split_ids[[count > 1 for count in counts]] = 0
    expected = step.attend(step.batch(None, counts=counts))
    arrays = step.arrays(padding=2)
    assert arrays is not None
    assert not arrays.counts[1]
    for stride in (0, -(-max(step.lens) // step.split)):
        found = step.attend(step.batch(arrays, counts=counts, padding=2, stride=stride))
        assert step.ran == "gpu_prefix"
        assert expected.isfinite().all()
        assert torch.equal(found, expected), stride


def check_that_keys_are_read_once(step: SharedStep) -> None:
    """Every member of a group but the first one loses its own copy of the first split, and nothing changes; without the
    group, everything does: the control."""
    arrays = step.arrays()
    assert arrays is not None
    before = step.attend(step.batch(None))
    per_split = step.split // step.block
    first = int(arrays.requests[0])
    others = [row for row in range(len(step.requests)) if row != first]
    # another order of the blocks: other keys at every position of the split
    step.tables[others, :per_split] = step.tables[others, :per_split].flip(1)
    assert torch.equal(step.attend(step.batch(arrays)), before)
    alone = step.attend(step.batch(None))
    assert torch.equal(alone[first], before[first])
    assert not any(torch.equal(alone[row], before[row]) for row in others)
