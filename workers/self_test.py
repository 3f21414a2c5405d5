"""Start-up self-test of any model: a sequence has the same bits however it is computed, and whatever it is batched
with.

The tree itself runs, with one block of each kind: a whole prompt, in chunks beside another sequence, as rows of a
decode step, and one row alone, each in cache blocks of another order. So every part of a model is tested, though
nothing here knows the parts. Matmuls are tested with more numbers of rows by `check_linears` on a CPU, and kernel by
kernel by `gpu.self_test` on a GPU. Fails closed: any difference raises InvarianceError, and the worker does not serve.
Nothing here draws from the global generators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from sempre.ipc.errors import InvarianceError
from sempre.kernels.attention import AttentionWorkspace, PagedBatch, SharedPrefixes
from sempre.kernels.attention.shared_prefixes import group_requests
from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.integers import IntegerScheme, IntegerWeight
from sempre.kernels.packed import PackedScheme, PackedWeight
from sempre.kernels.states import StateBatch, StateShape
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.layers.module import Module, Scratch, allocate, sharing
from sempre.workers.leaf_check import integers_like, layouts, leaves_apart_and_together
from sempre.workers.loading import WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import LayerKv
from sempre.workers.state_cache import StateCache
from sempre.workers.steps import Int32, OutputRows, StepInput, row_places
from sempre.workers.tensor_source import CPU

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# tokens of the sequence: on a CPU beyond two key tiles, on a GPU beyond one split of keys, each with a ragged end
_TOKENS = {"cpu": 150, "cuda": 1100}
# this many of them are computed again as rows of one decode step
_DECODED_ROWS = 40
# a bound on contexts above which a GPU may use another kernel for them
_LONG_BOUND = 8192
_NEIGHBOUR_TOKENS = 17
# slots of states: the neighbour's, the sequence's own, then those before its last tokens
_OTHER_SLOT, _OWN_SLOT, _LAST_SLOTS = range(3)
# rows whose logits are compared: the last ones, since the last layer may compute only those
_LOGIT_ROWS = 5

ROW_COUNTS = (2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 33, 64, 100, 128, 241, 256)
_DISTINCT_ROWS = 32
_MAX_COLUMNS = 256
_FULL_SIZE_ROWS = 5


class Comparison(NamedTuple):
    """The same rows, computed in two ways; judged at the end, with one wait for the device."""

    operation: str
    """with its sizes"""
    what: str
    """how the second way differs from the first"""
    different: torch.Tensor
    """elements, a number on the device"""
    total: int


def compare(operation: str, what: str, expected: torch.Tensor, found: torch.Tensor) -> Comparison:
    """Compare bit for bit; NaN always differs."""
    different = _other_bits(expected, found)
    if found.dtype.is_floating_point:
        different |= found.isnan()
    return Comparison(operation, what, different.sum(), expected.numel())


def compare_rows(operation: str, what: str, expected: torch.Tensor, found: torch.Tensor) -> Comparison:
    """Compare bit for bit; NaN, which weights may cause, equals any NaN."""
    both_nan = expected.isnan() & found.isnan()
    return Comparison(operation, what, (_other_bits(expected, found) & ~both_nan).sum(), expected.numel())


def _other_bits(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    bits = _BITS[expected.dtype.itemsize]
    return expected.contiguous().view(bits) != found.contiguous().view(bits)


def require_equal(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """Comparisons passed, by the first word of the operation. Raises InvarianceError for the first that failed."""
    compared = list(comparisons)
    counts = torch.stack([comparison.different for comparison in compared]).tolist() if compared else []
    passed: dict[str, int] = {}
    for (operation, what, _, total), different in zip(compared, counts, strict=True):
        if different:
            raise InvarianceError(
                f"self-test: {operation}: {what}: expected the same bits, found {different} of {total} elements"
                " different. The guarantee does not hold on this machine with these library versions; please report"
                " the operation and `sempre collect-env`.",
                operation=operation,
            )
        name = operation.split(" ", 1)[0]
        passed[name] = passed.get(name, 0) + 1
    return passed


# The tree


def check_model(
    model: CausalLM,
    facts: WeightFacts,
    block_size: int,
    *,
    max_tokens: int,
    workspace: AttentionWorkspace | None = None,
) -> Iterator[Comparison]:
    """The ways to compute a sequence; a step has at most `max_tokens` tokens."""
    probe = _Probe(model, facts, block_size, max_tokens, workspace)
    count, name = probe.num_tokens, f"model [{model.spec.architecture}, {str(facts.dtype).removeprefix('torch.')}]"
    whole = probe.run([*range(0, count, max_tokens), count], backwards=False)
    cuts = probe.cuts()
    chunked = probe.run(cuts, backwards=True, beside=True)
    yield compare_rows(name, f"in chunks, cut at {cuts}, beside another sequence", whole, chunked)
    decoded = probe.decode(_DECODED_ROWS)
    yield compare_rows(name, "as rows of a decode step", whole[-len(decoded) :], decoded)
    if (sharing_keys := probe.decode_sharing(_DECODED_ROWS)) is not None:
        yield compare_rows(name, "as rows of a decode step that share keys", decoded, sharing_keys)
    if probe.device.type == "cuda":
        for_long = probe.decode(_DECODED_ROWS, bound=_LONG_BOUND)
        yield compare_rows(name, "as rows of a decode step over long contexts", decoded, for_long)
    lone = probe.decode(1)
    yield compare_rows(name, "the last row alone", whole[-1:], lone)
    if (pair := probe.logits(whole)) is not None:
        yield compare_rows(name, "logits of one row and of several", *pair)


class _Probe:
    """One block of each kind, sharing only the weights with the model."""

    def __init__(
        self,
        model: CausalLM,
        facts: WeightFacts,
        block_size: int,
        max_tokens: int,
        workspace: AttentionWorkspace | None,
    ) -> None:
        self.device = model.device
        self.num_tokens = min(_TOKENS[self.device.type], model.spec.max_position_embeddings)
        self._max_tokens = min(max_tokens, self.num_tokens + _NEIGHBOUR_TOKENS)
        self._model, layers, states = _with_distinct_blocks(model)
        allocate(self._model, Scratch(self._max_tokens, self.num_tokens, facts.activations, self.device, workspace))
        self._block_size = block_size
        self._width = -(-self.num_tokens // block_size)
        self._keeps_states = any(states)
        slots = StateCache(states, _LAST_SLOTS + _DECODED_ROWS, facts.activations, self.device)
        self._caches = PagedKvCache(layers, 2 * self._width, block_size, facts.kv_dtype, self.device, slots).layers
        self._token_ids = torch.arange(self.num_tokens, dtype=torch.int64, device=CPU) * 7919 % model.spec.vocab_size

    def cuts(self) -> list[int]:
        """One token, then ragged pieces, each fitting in a step beside the neighbour's tokens."""
        longest = max(1, self._max_tokens - _NEIGHBOUR_TOKENS)
        ends = [0, 1]
        while ends[-1] < self.num_tokens:
            # share of the longest allowed piece, in turn
            share = (1, 0.66, 0.4)[len(ends) % 3]
            ends.append(min(self.num_tokens, ends[-1] + max(1, int(min(longest, self.num_tokens // 2) * share))))
        return ends

    def run(self, cuts: Sequence[int], *, backwards: bool, beside: bool = False) -> torch.Tensor:
        """Final hidden states of all tokens, computed in the chunks between `cuts`; keys and values stay in the
        cache, and so do the states before the last tokens."""
        blocks = list(range(self._width))
        self._blocks = blocks[::-1] if backwards else blocks
        other = list(range(self._width, 2 * self._width))
        rows = []
        for start, end in pairwise(cuts):
            requests = [(start, end, self._blocks)]
            if beside:
                requests.insert(0, (0, min(_NEIGHBOUR_TOKENS, self._max_tokens - (end - start)), other))
            hidden = self._forward([request for request in requests if request[1] > request[0]], reads_last=True)
            rows.append(hidden.clone())
        return torch.cat(rows)

    def decode(self, count: int, *, bound: int = 0) -> torch.Tensor:
        """The last tokens as `count` requests of one token each, over the keys and values of the last run; kernels are
        chosen for contexts of `bound` tokens or more."""
        count = min(count, self.num_tokens, self._max_tokens)
        first = self.num_tokens - count
        return self._forward([(at, at + 1, self._blocks) for at in range(first, self.num_tokens)], bound=bound).clone()

    def decode_sharing(self, count: int) -> torch.Tensor | None:
        """The same on a GPU, with the keys of whole splits read once for all; None where there is no whole split."""
        count = min(count, self.num_tokens, self._max_tokens)
        if self.device.type != "cuda":
            return None
        from sempre.kernels.attention.gpu_tiles import SPLIT

        first = self.num_tokens - count
        contexts, num_splits = np.arange(first + 1, self.num_tokens + 1), -(-self.num_tokens // SPLIT)
        ids = np.arange(1, num_splits + 1, dtype=np.int32)
        whole = ids <= (contexts // SPLIT)[:, None]
        arrays = group_requests(np.where(whole, ids, 0).astype(np.int32), count, least_saved=1)
        if arrays is None:
            return None
        requests = [(at, at + 1, self._blocks) for at in range(first, self.num_tokens)]
        return self._forward(requests, prefixes=arrays.on_device(self.device, num_splits)).clone()

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits of some rows, or a classifier's scores, one by one and together; None without a head."""
        model = self._model
        if not model.parallel.stage.is_last:
            return None
        compute, width = model.logits, model.spec.vocab_size
        if model.spec.pooling is not None:
            if model.score is None:
                return None
            compute, width = model.scores, model.score.out_features
        some = hidden[-_LOGIT_ROWS:].contiguous()
        out = torch.empty(2, len(some), width, dtype=torch.float32, device=self.device)
        for row in range(len(some)):
            compute(some[row : row + 1], out[0, row : row + 1])
        compute(some, out[1])
        return out[0], out[1]

    def _forward(
        self,
        requests: list[tuple[int, int, list[int]]],
        *,
        reads_last: bool = False,
        prefixes: SharedPrefixes | None = None,
        bound: int = 0,
    ) -> torch.Tensor:
        """Final hidden states of the tokens [start, end) of each request, whose cache blocks are given.

        `reads_last`: only those of the last request. `bound`: the step may have contexts as long.
        """
        size, device = self._block_size, self.device
        starts, ends = (np.asarray([request[at] for request in requests], np.int64) for at in (0, 1))
        tables = np.asarray([blocks for _, _, blocks in requests], np.int32)
        places = row_places(starts, ends - starts, tables, size)
        positions, query_starts = torch.from_numpy(places.positions), torch.from_numpy(places.query_starts)
        states = self._states(requests, places.query_starts, writes=reads_last) if self._keeps_states else None
        step = StepInput(
            token_ids=self._token_ids[positions].to(device),
            positions=positions.to(device),
            slot_mapping=torch.from_numpy(places.slot_mapping).to(device),
            batch=PagedBatch(
                block_tables=torch.from_numpy(tables).to(device),
                query_starts=query_starts.to(device),
                context_lens=torch.from_numpy(ends.astype(np.int32)).to(device),
                max_query_len=int((ends - starts).max()),
                max_context_len=max(int(ends.max()), bound),
                prefixes=prefixes,
            ),
            outputs=_rows_of_last(query_starts, device) if reads_last else None,
            states=states,
        )
        return self._model.forward(step, self._caches)

    def _states(self, requests: list[tuple[int, int, list[int]]], query_starts: Int32, *, writes: bool) -> StateBatch:
        """Slots that the requests of a run, or without `writes` of a decode step, read and write."""
        reads = [self._slot_after(start) if start else -1 for start, _, _ in requests]
        written: Int32 = np.full(query_starts[-1], -1, np.int32)
        for (start, end, blocks), first in zip(requests, query_starts.tolist(), strict=False):
            if writes and blocks is not self._blocks:
                written[first + end - start - 1] = _OTHER_SLOT
            elif writes:
                # each of the last rows leaves its state in a slot of its own, as drafts do
                lengths = {end, *range(max(start + 1, self.num_tokens - _DECODED_ROWS), end)}
                for length in lengths:
                    written[first + length - start - 1] = self._slot_after(length)
        arrays = (np.asarray(reads, np.int32), written, query_starts)
        return StateBatch(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def _slot_after(self, length: int) -> int:
        """Where the state of this many of the sequence's tokens is."""
        missing = self.num_tokens - length
        return _LAST_SLOTS + missing - 1 if 0 < missing <= _DECODED_ROWS else _OWN_SLOT


def _rows_of_last(starts: torch.Tensor, device: torch.device) -> OutputRows:
    first, end = int(starts[-2]), int(starts[-1])
    read = torch.zeros_like(starts)
    read[-1] = end - first
    rows = torch.arange(first, end, dtype=torch.int64, device=device)
    return OutputRows(rows, read.to(torch.int32).to(device), end - first)


def _with_distinct_blocks(model: CausalLM) -> tuple[CausalLM, list[LayerKv], list[StateShape | None]]:
    """The model with the first block of each kind, sharing tensors, and what these keep in the KV cache, or as states;
    what it allocates is its own.

    A block that reads another layer's keys and values reads those of the block of that layer's kind.
    """
    probe = sharing(model)
    blocks = {index: probe.model.layers[index] for index in probe.model.own_layers}
    kinds = {index: _kind(block) for index, block in blocks.items() if isinstance(block, Module)}
    first: dict[object, int] = {}
    for index, kind in kinds.items():
        first.setdefault(kind, index)
    places = {kind: place for place, kind in enumerate(first)}
    layers = [model.kv_layers[index] for index in first.values()]
    probe.model.set_layers([blocks[index] for index in first.values()])
    kept = [layer if layer.source is None else layer._replace(source=places[kinds[layer.source]]) for layer in layers]
    return probe, kept, [model.layer_states[index] for index in first.values()]


def _kind(block: Module) -> object:
    """Blocks of one kind run the same kernels."""
    return tuple((path, type(module), module.shape()) for path, module in block.walk())


# Matmuls on a CPU


def distinct_linears(model: CausalLM) -> list[tuple[str, Linear]]:
    """One of each kind that is computed alike (shape, fp8 scheme, use and activation): the first, with its path."""
    seen: dict[object, tuple[str, Linear]] = {}
    for path, linear in model.linears():
        kind = (linear.use, linear.activation, shape_of(linear.weight), _details(linear.weight))
        seen.setdefault(kind, (path, linear))
    return list(seen.values())


def shape_of(weight: LinearWeight) -> tuple[int, int, Fp8Scheme | IntegerScheme | PackedScheme | None, int]:
    """Matrices of equal shape, scheme and leaves are multiplied by the same kernels; integers by those of a layout."""
    return weight.out_features, weight.in_features, weight.scheme, weight.leaves


def _details(weight: LinearWeight) -> tuple[object, ...]:
    return (weight.group, weight.scale_dtype) if isinstance(weight, PackedWeight) else layouts(weight)


def check_linears(model: CausalLM, matrix_dtype: torch.dtype, max_tokens: int) -> Iterator[Comparison]:
    """Rows one at a time against the same rows in batches of many sizes, for every distinct linear on a CPU.

    With random weights of at most `_MAX_COLUMNS` columns (columns are independent; the remainder of N is kept), and
    with the model's own at one size.
    """
    generator = torch.Generator().manual_seed(0x5E3F)
    row_counts = [count for count in ROW_COUNTS if count <= max_tokens]
    for path, linear in distinct_linears(model):
        weight = linear.weight
        columns, depth = weight.out_features, weight.in_features
        stored_as = weight.scheme.value if weight.scheme is not None else str(matrix_dtype).removeprefix("torch.")
        operation = f"linear {path.rpartition('.')[2]} [N={columns}, K={depth}, {stored_as}]"
        tested = columns if columns <= _MAX_COLUMNS else _MAX_COLUMNS - (-columns % 32)
        small = _random_weight(tested, weight, linear.kernel, matrix_dtype, generator)
        x = torch.randn(_DISTINCT_ROWS, depth, generator=generator, dtype=torch.float32, device=CPU)
        yield from _compare_rows(operation, x, small, linear.kernel, row_counts)
        yield from _compare_rows(operation, x, weight, linear.kernel, [_FULL_SIZE_ROWS])
        if weight.leaves > 1:
            pair = leaves_apart_and_together(x, weight, linear.kernel, matrix_dtype, generator)
            yield compare(operation, f"{weight.leaves} leaves against each by itself", *pair)


def _random_weight(
    columns: int, like: LinearWeight, kernel: LinearKernel, matrix_dtype: torch.dtype, generator: torch.Generator
) -> LinearWeight:
    weight = torch.randn(columns, like.in_features, generator=generator, dtype=torch.float32, device=CPU)
    leaves = [like.leaves] if like.leaves > 1 else []
    if isinstance(like, IntegerWeight):
        return kernel.pack_integers(integers_like(like, weight), None, like.scheme, *leaves)
    if not isinstance(like.scheme, Fp8Scheme):
        return kernel.pack(weight.to(matrix_dtype), None, *leaves)
    return kernel.pack_fp8(*quantize_channels(weight), None, like.scheme, *leaves)


def _compare_rows(
    operation: str, x: torch.Tensor, weight: LinearWeight, kernel: LinearKernel, row_counts: Sequence[int]
) -> Iterator[Comparison]:
    distinct = min(x.shape[0], max(row_counts, default=0))
    alone = torch.empty(distinct, weight.out_features, dtype=torch.float32, device=CPU)
    for row in range(distinct):
        kernel.linear(x[row : row + 1], weight, alone[row : row + 1])
    for count in row_counts:
        # another start per count, so that each row gets other places and neighbours
        order = (torch.arange(count, dtype=torch.int64, device=CPU) + count) % distinct
        out = torch.empty(count, weight.out_features, dtype=torch.float32, device=CPU)
        kernel.linear(x[order].contiguous(), weight, out)
        yield compare(operation, f"M={count}", alone[order], out)
