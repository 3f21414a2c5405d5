"""Every module's results for one sequence, in the order in which they are computed: where two engines first differ.

The tree itself runs, all layers of it, on its own cache and scratch; a module's methods are wrapped for that one pass.
A result is known by a digest per row; the values of one are returned on request. What a block does between its modules
(rope, the cache, attention) shows as the result of the block's own call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch

from sempre.ipc.errors import ConfigError
from sempre.kernels.attention import AttentionWorkspace, PagedBatch
from sempre.kernels.states import StateBatch
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.module import Module, Scratch, allocate, sharing
from sempre.workers.loading import WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.state_cache import StateCache
from sempre.workers.steps import StepInput, row_places
from sempre.workers.tensor_source import CPU, tensor_bytes

MAX_TOKENS = 4096
_DIGEST_BYTES = 8
_LOGITS = "logits"


class TracedResult(NamedTuple):
    """One result of one call."""

    path: str
    """of the module, as in the checkpoint"""
    operation: str
    """its class and method"""
    rows: torch.Tensor
    """[T, …] on the CPU"""


def trace_modules(
    model: CausalLM,
    facts: WeightFacts,
    token_ids: Sequence[int],
    *,
    block_size: int,
    workspace: AttentionWorkspace | None,
) -> list[TracedResult]:
    """Compute a prompt in one step; return every result that has a row for each token, then the logits; of a stage,
    its own.

    Raises ConfigError for an empty or too long prompt, or an id outside the vocabulary.
    """
    _check(token_ids, model)
    results: list[TracedResult] = []
    twin = sharing(model)
    count = len(token_ids)
    for path, module in twin.walk():
        _wrap(module, path, lambda *found: results.append(TracedResult(*found)), count)
    device = model.device
    allocate(twin, Scratch(count, count, facts.activations, device, workspace))
    hidden = twin.forward(*_step(twin, facts, token_ids, block_size))
    if not model.parallel.stage.is_last:
        return results
    logits = torch.empty(count, model.spec.vocab_size, dtype=torch.float32, device=device)
    for row in range(count):
        twin.logits(hidden[row : row + 1].contiguous(), logits[row : row + 1])
    results = [found for found in results if not found.path.startswith("lm_head")]
    return [*results, TracedResult(_LOGITS, type(model).__name__, logits.to(CPU))]


def trace_methods(
    trace: Callable[[list[int]], list[TracedResult]], own_rank: Callable[[], int]
) -> dict[str, Callable[..., object]]:
    """Methods of a worker that call `trace` for a prompt."""

    def traced(token_ids: list[int]) -> list[list[object]]:
        """Path, operation, dtype, elements per row and a digest per row of each module's results, in order."""
        return [
            [
                found.path,
                found.operation,
                str(found.rows.dtype).removeprefix("torch."),
                found.rows[0].numel(),
                row_digests(found.rows),
            ]
            for found in trace(token_ids)
        ]

    def traced_row(token_ids: list[int], rank: int, index: int, row: int) -> bytes:
        """The values of one row of one of the results of `rank`; of other ranks, which must take part, nothing."""
        results = trace(token_ids)
        if rank != own_rank():
            return b""
        if not (0 <= index < len(results) and 0 <= row < len(token_ids)):
            raise ConfigError(
                f"index, row: expected less than {len(results)} and {len(token_ids)}, found {index} and {row}.",
                parameter="index",
            )
        return bytes(tensor_bytes(results[index].rows[row].contiguous()))

    return {"trace_modules": traced, "traced_row": traced_row}


def row_digests(rows: torch.Tensor) -> bytes:
    """Return 8 bytes of SHA-256 for each row."""
    return b"".join(hashlib.sha256(tensor_bytes(row.contiguous())).digest()[:_DIGEST_BYTES] for row in rows)


def _check(token_ids: Sequence[int], model: CausalLM) -> None:
    if not 0 < len(token_ids) <= min(MAX_TOKENS, model.spec.max_position_embeddings):
        raise ConfigError(
            f"token_ids: expected 1 to {min(MAX_TOKENS, model.spec.max_position_embeddings)} ids, found"
            f" {len(token_ids)}.",
            parameter="token_ids",
        )
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < model.spec.vocab_size:
            raise ConfigError(
                f"token_ids: expected ids in [0, {model.spec.vocab_size}), found {token_id!r}.", parameter="token_ids"
            )


def _wrap(module: Module, path: str, note: Callable[[str, str, torch.Tensor], None], num_rows: int) -> None:
    """Make the methods of this module, which is nobody else's, note their results."""
    kind = type(module)
    methods = dict(_methods(kind))

    def noting(name: str, method: FunctionType) -> Callable[..., Any]:
        def call(self: Module, *values: Any, **keywords: Any) -> Any:
            result = method(self, *values, **keywords)
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, torch.Tensor) and part.dim() > 1 and part.shape[0] == num_rows:
                    suffix = "" if name == "__call__" else f".{name}"
                    note(path, f"{kind.__name__}{suffix}", part.detach().to(CPU, copy=True))
            return result

        return call

    module.__class__ = type(kind.__name__, (kind,), {name: noting(name, method) for name, method in methods.items()})


def _methods(kind: type[Module]) -> Iterator[tuple[str, FunctionType]]:
    """The public methods that a class adds to those of every module, the most derived first."""
    seen = set(vars(Module))
    for base in kind.__mro__:
        for name, value in vars(base).items():
            is_public = name == "__call__" or not name.startswith("_")
            if isinstance(value, FunctionType) and is_public and name not in seen:
                seen.add(name)
                yield name, value


def _step(
    model: CausalLM, facts: WeightFacts, token_ids: Sequence[int], block_size: int
) -> tuple[StepInput, Sequence[Any]]:
    """A step of one whole prompt, and the cache that it fills."""
    count, device = len(token_ids), model.device
    num_blocks = -(-count // block_size)
    kept_states = model.layer_states
    slots = StateCache(kept_states, 1, facts.activations, device)
    cache = PagedKvCache(model.kv_layers, num_blocks, block_size, facts.kv_dtype, device, slots)
    starts, lengths = np.zeros(1, np.int64), np.asarray([count], np.int64)
    tables = np.arange(num_blocks, dtype=np.int32)[None]
    places = row_places(starts, lengths, tables, block_size)
    query_starts = torch.from_numpy(places.query_starts).to(device)
    states = None
    if any(model.spec.layer_states):
        reads, writes = np.asarray([-1], np.int32), np.full(count, -1, np.int32)
        arrays = (reads, writes, places.query_starts)
        states = StateBatch(*(torch.from_numpy(array).to(device) for array in arrays))
    step = StepInput(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(places.positions).to(device),
        slot_mapping=torch.from_numpy(places.slot_mapping).to(device),
        batch=PagedBatch(
            block_tables=torch.from_numpy(tables).to(device),
            query_starts=query_starts,
            context_lens=torch.tensor([count], dtype=torch.int32, device=device),
            max_query_len=count,
            max_context_len=count,
        ),
        outputs=None,
        states=states,
    )
    return step, cache.layers
