"""CUDA graphs of the whole decode step, one per shape, captured after its first run and replayed afterwards.

A shape is a number of rows (a bucket; the rows beyond the step's are padding), a bound of the context (it chooses the
attention's grids), the stages of sampling, and whether any row has an adapter. None of it affects the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

if TYPE_CHECKING:
    from sempre.kernels.sampling.gpu import Stages

logger = logging.getLogger(__name__)

_SMALL_BUCKETS = (1, 2, 4, 8)
# (up to, in steps of)
_BUCKET_STEPS = ((256, 8), (1024, 64))
_MIN_CONTEXT = 512


class DecodeShape(NamedTuple):
    """What a graph is captured for."""

    num_rows: int
    max_context_len: int
    stages: Stages
    shares_prefixes: bool = False
    """whether keys that several requests share are read once"""
    has_adapters: bool = False
    """whether any row has an adapter"""


def row_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, every eighth up to 256, every 64th up to 1,024, as far as `max_num_seqs` goes; ascending."""
    buckets = {*_SMALL_BUCKETS, max_num_seqs}
    for end, step in _BUCKET_STEPS:
        buckets.update(range(step, end + 1, step))
    return sorted(bucket for bucket in buckets if bucket <= min(max_num_seqs, _BUCKET_STEPS[-1][0]))


def context_bucket(context_len: int, max_model_len: int) -> int:
    """The bound to capture for: 512 doubled until it holds `context_len`, at most `max_model_len`."""
    bound = _MIN_CONTEXT
    while bound < context_len:
        bound *= 2
    return min(bound, max_model_len)


def size_bucket(count: int) -> int:
    """The number to pad to where a shape has several sizes: 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


Shape = TypeVar("Shape", bound=Hashable)


class DecodeGraphs(Generic[Shape]):
    """Runs a decode step as a graph if possible, else directly; the bits are the same."""

    def __init__(self, launch: Callable[[Shape], None], *, enabled: bool) -> None:
        """`launch` queues the kernels of a step; it must read its inputs at fixed addresses and allocate nothing."""
        self._launch = launch
        self._pool: Any = None
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._enabled = enabled
        self.failure: str | None = None

    @property
    def state(self) -> str:
        """For the fingerprint: `on`, `off` or `failed`."""
        if self.failure is not None:
            return "failed"
        return "on" if self._enabled else "off"

    @property
    def enabled(self) -> bool:
        return self._enabled and self.failure is None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, shape: Shape) -> None:
        """Queue one step of this shape."""
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.replay()
            return
        self._launch(shape)
        # only now: the launch has compiled what the capture needs, and a capture computes nothing
        if self.enabled:
            self._capture(shape)

    def _capture(self, shape: Shape) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._launch(shape)
        except RuntimeError as error:  # out of memory, or something that this driver does not capture
            # a failed end of capture leaves its own stream as the current one
            torch.cuda.set_stream(stream)
            self.failure = str(error)
            self._graphs.clear()
            logger.warning("CUDA graphs are off: the capture of %s failed: %s", shape, error)
            return
        if self._pool is None:
            self._pool = graph.pool()
        self._graphs[shape] = graph

    def clear(self) -> None:
        """Forget all graphs: their addresses are stale."""
        self._graphs.clear()
