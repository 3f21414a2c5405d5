"""Inputs of attention and rope: the requests of a step, the layout of heads in a row, the paged cache, and scratch.

# R requests, T query tokens, Hq query heads, Hkv key heads, D head dim, B keys per block
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.attention.shared_prefixes import SharedPrefixes
from sempre.kernels.checks import check_index
from sempre.kernels.fp8 import FP8

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PagedBatch:
    """The requests of a step. ValueError unless the arrays are contiguous int32."""

    block_tables: torch.Tensor
    """int32 [R, blocks]; entries past a request's context are not read"""
    query_starts: torch.Tensor
    """int32 [R + 1]: rows [query_starts[r], query_starts[r + 1]) belong to request r"""
    context_lens: torch.Tensor
    """int32 [R]: keys visible to the last row of request r"""
    max_query_len: int
    """no request has more rows; 1: row r belongs to request r"""
    max_context_len: int
    """no context is longer; this bound and the one above choose grids on a GPU and do not affect the result"""
    prefixes: SharedPrefixes | None = field(default=None, compare=False)
    """of a step of single rows on a GPU: keys to read once for several of them, without any effect on the result"""
    fits: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False, compare=False)
    """(rows, blocks of a cache) that this batch has been checked against: the layers of a step ask for the same"""

    def __post_init__(self) -> None:
        check_index("PagedBatch", "block_tables", self.block_tables, torch.int32)
        check_index("PagedBatch", "query_starts", self.query_starts, torch.int32)
        check_index("PagedBatch", "context_lens", self.context_lens, torch.int32)

    @cached_property
    def num_requests(self) -> int:
        return int(self.context_lens.shape[0])

    @cached_property
    def arrays(self) -> tuple[Int32, Int32, Int32]:
        """Block tables, query starts and context lengths of a batch on the CPU, sharing their memory."""
        return self.block_tables.numpy(), self.query_starts.numpy(), self.context_lens.numpy()


@dataclass(frozen=True)
class HeadLayout:
    """The heads in a row of qkv [T, (Hq + P Hkv) D]: queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """a multiple of 16"""
    kv_parts: Literal[0, 1, 2] = 2
    """P; 2: keys and values; 1: keys only, which before norm and rope are the values too; 0: neither, the cache is
    another layer's and not written"""

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def qkv_width(self) -> int:
        return (self.num_heads + self.kv_parts * self.num_kv_heads) * self.head_dim

    def check_rows(self, operation: str, qkv: torch.Tensor, num_rows: int) -> None:
        """ValueError unless `qkv` has that many rows of these heads, or more."""
        if qkv.shape[1] != self.qkv_width or num_rows > qkv.shape[0]:
            raise ValueError(f"{operation}: qkv {tuple(qkv.shape)} does not fit {num_rows} rows of {self}")


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each query and key head before rope: weights [D] of both, in the model's dtype."""

    q: torch.Tensor
    k: torch.Tensor | None
    """None: rows hold no keys"""
    eps: float
    values: bool = False
    """whether values are normed too, without a weight"""


@dataclass(frozen=True)
class ScoreParams:
    """How scores are computed from the dot products of queries and keys."""

    scale: float
    window: int | None = None
    """a row sees the last `window` keys up to itself; None: all"""
    soft_cap: float | None = None
    """scores are cap * tanh(score / cap)"""
    sinks: torch.Tensor | None = field(default=None, compare=False)
    """float32 [Hq]: a head's rows have this score beside those of their keys, with a value of zeros"""

    def check_sinks(self, operation: str, heads: HeadLayout) -> None:
        """ValueError unless there is one for each head, or none."""
        if self.sinks is not None and (self.sinks.shape != (heads.num_heads,) or self.sinks.dtype != torch.float32):
            found = f"{self.sinks.dtype} {tuple(self.sinks.shape)}"
            raise ValueError(f"{operation}: expected float32 sinks ({heads.num_heads},), found {found}")


@dataclass(frozen=True)
class KvCache:
    """One layer's keys and values, in the cache's dtype. ValueError unless they are contiguous and of one dtype, and
    have scales if that is fp8, and only then.

    On CPU `k` is [blocks, Hkv, D, B] (transposed) and `v` [blocks, Hkv, B, D]; on a GPU both are [blocks, Hkv, B, D].
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    """float32 [blocks, Hkv, B]: what the elements of each key are multiplied by"""
    v_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not (self.k.is_contiguous() and self.v.is_contiguous() and self.k.dtype is self.v.dtype):
            raise ValueError("KvCache: expected contiguous keys and values of one dtype")
        scales = [scale for scale in (self.k_scale, self.v_scale) if scale is not None]
        if len(scales) != (2 if self.k.dtype is FP8 else 0):
            raise ValueError(
                f"KvCache: expected two scales with {FP8} and none else, found {len(scales)}, {self.k.dtype}"
            )
        expected = self.v.shape[:3]
        if any(s.shape != expected or s.dtype != torch.float32 or not s.is_contiguous() for s in scales):
            found = ", ".join(f"{scale.dtype} {tuple(scale.shape)}" for scale in scales)
            raise ValueError(f"KvCache: expected contiguous float32 scales {tuple(expected)}, found {found}")

    @property
    def scale_addresses(self) -> tuple[int, int]:
        """Of keys and values; 0 where there are none."""
        if self.k_scale is None or self.v_scale is None:
            return 0, 0
        return self.k_scale.data_ptr(), self.v_scale.data_ptr()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept, each [blocks, ...]."""
        return tuple(part for part in (self.k, self.v, self.k_scale, self.v_scale) if part is not None)


@dataclass(frozen=True)
class AttentionWorkspace:
    """Partials of splits: `acc` [tokens, Hq, splits, D], `m` and `l` [tokens, Hq, splits], float32; and int32 counters,
    zeros before a launch and after: `counters` [2] of programs that share out their work, `arrived` of the splits of
    each request and key head that are complete."""

    acc: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor  # noqa: E741
    counters: torch.Tensor
    arrived: torch.Tensor

    @property
    def max_splits(self) -> int:
        return int(self.acc.shape[2])

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in vars(self).values())

    def holds(self, tokens: int, splits: int) -> bool:
        return tokens <= self.acc.shape[0] and splits <= self.max_splits

    def has_room_for(self, rows: int, splits: int, heads: HeadLayout) -> bool:
        """Whether it can be divided anew into `splits` partials of that many rows."""
        count = rows * heads.num_heads * splits
        return count <= self.m.numel() and count * heads.head_dim <= self.acc.numel()
