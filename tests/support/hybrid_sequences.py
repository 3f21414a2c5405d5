"""A model whose layers have keys and values, or states, driven step by step with chosen blocks and slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from worker_settings import worker_config

from sempre.kernels.attention import PagedBatch, allocate_kv_cache
from sempre.kernels.states import StateBatch, allocate_layer_state
from sempre.workers.layers.linear_kernel import INVARIANT, LinearKernel
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.loading import load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.steps import StepInput, row_places

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS, MOST = 16, 40, 24, 256


class Part(NamedTuple):
    """Tokens [start, end) of a sequence, as a request of a step."""

    ids: list[int]
    start: int
    end: int
    blocks: list[int]
    read: int = -1
    writes: list[int] | None = None
    """one a row; None: the last row writes to slot 0"""


class HybridModel:
    def __init__(self, folder: Path, kernel: LinearKernel = INVARIANT) -> None:
        spec = load_spec(folder)
        self.model, facts = load_model(worker_config(folder), spec, kernel)
        allocate(self.model, Scratch(MOST, MOST, facts.activations, CPU))
        self.caches: list[Any] = [
            allocate_kv_cache(BLOCKS, spec.num_kv_heads, spec.head_dim, BLOCK, facts.kv_dtype, CPU)
            if shape is None
            else allocate_layer_state(shape, SLOTS, facts.activations, CPU)
            for shape in spec.layer_states
        ]
        for cache, shape in zip(self.caches, spec.layer_states, strict=True):
            if shape is not None:
                cache.recurrent.fill_(float("nan"))
                cache.conv.fill_(float("nan"))

    def step(self, *parts: Part) -> list[torch.Tensor]:
        """Logits of all rows of each part."""
        starts, ends = (np.asarray([getattr(part, name) for part in parts], np.int64) for name in ("start", "end"))
        width = max(len(part.blocks) for part in parts)
        tables = np.asarray([part.blocks + [0] * (width - len(part.blocks)) for part in parts], np.int32)
        places = row_places(starts, ends - starts, tables, BLOCK)
        writes = [part.writes or [-1] * (part.end - part.start - 1) + [0] for part in parts]
        query_starts = torch.from_numpy(places.query_starts)
        step = StepInput(
            token_ids=torch.tensor([token for part in parts for token in part.ids[part.start : part.end]]),
            positions=torch.from_numpy(places.positions),
            slot_mapping=torch.from_numpy(places.slot_mapping),
            batch=PagedBatch(
                block_tables=torch.from_numpy(tables),
                query_starts=query_starts,
                context_lens=torch.from_numpy(ends.astype(np.int32)),
                max_query_len=int((ends - starts).max()),
                max_context_len=int(ends.max()),
            ),
            states=StateBatch(
                torch.tensor([part.read for part in parts], dtype=torch.int32),
                torch.tensor([slot for row in writes for slot in row], dtype=torch.int32),
                query_starts,
            ),
        )
        hidden = self.model.forward(step, self.caches)
        out = torch.empty(len(hidden), self.model.spec.vocab_size, dtype=torch.float32, device=CPU)
        return list(self.model.logits(hidden, out).split((ends - starts).tolist()))
