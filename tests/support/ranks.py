"""The ranks of one model as threads of this process, which share memory as worker processes do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from worker_settings import worker_config

from sempre.ipc.config import NumericsProfile
from sempre.ipc.messages import AdapterSpec
from sempre.ipc.rank_links import RankLinks
from sempre.kernels.attention import PagedBatch
from sempre.kernels.states import StateBatch
from sempre.workers.adapters.store import AdapterStore
from sempre.workers.cpu.exchange import SharedMemoryExchange
from sempre.workers.cpu.linked_replica import LinkedReplica
from sempre.workers.cpu.replica_file import ReplicaFile
from sempre.workers.input_batch import RequestState
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.lora import StepAdapters
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.loading import Loaded, load_model
from sempre.workers.models.base import CausalLM
from sempre.workers.models.registry import load_spec
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.state_cache import StateCache
from sempre.workers.steps import StepInput, row_places, step_adapters

Result = TypeVar("Result")

CPU = torch.device("cpu")
BLOCK, MOST = 16, 256


def on_all_ranks(size: int, action: Callable[[int], Result]) -> list[Result]:
    """`action` of each rank at once; raises the first one's error."""
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(action, rank) for rank in range(size)]]


class Ranks:
    """A model on `size` ranks of each of `num_stages` stages, by default on one worker, with a KV cache for one
    sequence."""

    def __init__(
        self,
        folder: Path | str,
        size: int,
        profile: NumericsProfile = "tree8",
        patience_s: float = 60.0,
        num_stages: int = 1,
        adapter: AdapterSpec | None = None,
        links: Sequence[RankLinks] = (),
        **settings: Any,
    ) -> None:
        """With an adapter, two of three tokens have it. `links`: of each rank, which then share no memory."""
        self.size = size
        self._links = links
        self.num_stages = num_stages
        self._config = worker_config(folder, **settings)
        self._profile = profile
        self._patience_s = patience_s
        self._descriptor = os.memfd_create("ranks")
        self.exchanges: list[SharedMemoryExchange] = []
        try:
            self.loaded = on_all_ranks(size * num_stages, self._load)
        finally:
            os.close(self._descriptor)
        self._has_adapter = adapter is not None
        if adapter is not None:
            for model, facts in self.loaded:
                state, errors = SimpleNamespace(request_id="0", adapter=adapter), {}
                AdapterStore(self._config, model, facts.activations).prepare([cast(RequestState, state)], errors)
                assert not errors
                assert state.adapter_slot == 0
        self.caches = [prepared(loaded) for loaded in self.loaded]

    def _load(self, rank: int) -> Loaded:
        spec = load_spec(Path(self._config.model_path))
        return load_model(self._config, spec, INVARIANT, parallel=self._parallel(rank))

    def _parallel(self, rank: int) -> Parallel:
        if self._links:
            linked = LinkedReplica(self._links[rank], self.size, self.num_stages, rank, patience_s=self._patience_s)
            return parallel_of(self._profile, rank % self.size, self.size, linked.exchange(), stage=linked.stage())
        file = ReplicaFile(self._descriptor, self.size, self.num_stages, rank, patience_s=self._patience_s)
        exchange, stage = file.exchange(), file.stage()
        if exchange is not None:
            self.exchanges.append(exchange)
        return parallel_of(self._profile, rank % self.size, self.size, exchange, stage=stage)

    def logits(self, token_ids: Sequence[int], cuts: Sequence[int] = ()) -> list[torch.Tensor]:
        """Those of all tokens [T, V], by rank of the last stage; the sequence is computed in pieces that end at
        `cuts`."""
        ends = [*cuts, len(token_ids)]

        def run(rank: int) -> torch.Tensor:
            pieces = zip([0, *ends], ends, strict=False)
            return torch.cat([self._piece(rank, token_ids, start, end) for start, end in pieces])

        return on_all_ranks(self.size * self.num_stages, run)[-self.size :]

    def _piece(self, rank: int, token_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        slots = [0 if self._has_adapter and place % 3 else -1 for place in range(start, end)]
        adapters = step_adapters(torch.tensor(slots, dtype=torch.int32), None) if self._has_adapter else None
        return logits_of(self.loaded[rank].model, self.caches[rank], token_ids, start, end, adapters)


def prepared(loaded: Loaded) -> PagedKvCache:
    """Allocate what the model needs for one sequence; its cache."""
    model, facts = loaded
    allocate(model, Scratch(MOST, MOST, facts.activations, CPU))
    states = StateCache(model.layer_states, 1, facts.activations, CPU)
    return PagedKvCache(model.kv_layers, MOST // BLOCK, BLOCK, facts.kv_dtype, CPU, states)


def logits_of(
    model: CausalLM,
    cache: PagedKvCache,
    token_ids: Sequence[int],
    start: int,
    end: int,
    adapters: StepAdapters | None = None,
) -> torch.Tensor:
    """Those of tokens [start, end) of a sequence whose earlier ones are in the cache."""
    starts, counts = np.asarray([start], np.int64), np.asarray([end - start], np.int64)
    table = np.arange(MOST // BLOCK, dtype=np.int32)[None, :]
    places = row_places(starts, counts, table, BLOCK)
    query_starts = torch.from_numpy(places.query_starts)
    states = None
    if any(model.spec.layer_states):
        written = torch.tensor([-1] * (end - start - 1) + [0], dtype=torch.int32)
        states = StateBatch(torch.tensor([0 if start else -1], dtype=torch.int32), written, query_starts)
    step = StepInput(
        token_ids=torch.tensor(token_ids[start:end], dtype=torch.int64),
        positions=torch.from_numpy(places.positions),
        slot_mapping=torch.from_numpy(places.slot_mapping),
        batch=PagedBatch(
            block_tables=torch.from_numpy(table),
            query_starts=query_starts,
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=end - start,
            max_context_len=end,
        ),
        states=states,
        adapters=adapters,
    )
    hidden = model.forward(step, cache.layers)
    if not model.parallel.stage.is_last:
        return hidden
    return model.logits(hidden, torch.full((len(hidden), model.spec.vocab_size), float("nan")))
