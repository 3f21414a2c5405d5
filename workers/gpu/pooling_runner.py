"""Pools prompts on a GPU: the host plans and queues a step while the device computes the previous one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sempre.ipc.messages import ExecuteStep
from sempre.workers.gpu.queued_step import QueuedRunner, QueuedStep
from sempre.workers.gpu.step_buffers import StepBuffers
from sempre.workers.input_batch import StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.pooling import Pooler
from sempre.workers.runner import StepInFlight
from sempre.workers.sampling import GrammarCompiler, RowResult
from sempre.workers.step_validation import StepLimits, ValidStep


@dataclass
class _Queued(QueuedStep):
    """A step whose results are not on the host yet."""

    values: torch.Tensor | None = None
    """on the host, filled when `done`"""


@dataclass(frozen=True)
class PoolingMemory:
    """What steps need besides the cache, which gets the rest."""

    model: CausalLM
    pooler: Pooler


class GpuPoolingRunner(QueuedRunner):
    """One replica's model, cache, pooler, and the requests it knows."""

    def __init__(
        self, memory: PoolingMemory, cache: PagedKvCache, grammars: GrammarCompiler, limits: StepLimits, *, rank: int
    ) -> None:
        super().__init__(memory.model, cache, grammars, limits, None, rank)
        self._pooler = memory.pooler
        self._buffers = StepBuffers(
            memory.model.device,
            limits,
            num_slots=self._batch.num_slots,
            table_width=self._batch.table_width,
            block_size=cache.block_size,
        )

    @torch.inference_mode()
    def _update_requests(self, step: ExecuteStep, valid: ValidStep) -> None:
        if self._batch.num_slots > self._buffers.num_slots:
            self._buffers.grow_slots(self._batch.num_slots)
            self._pooler.grow_slots(self._batch.num_slots)

    @torch.inference_mode()
    def _start(self, step: ExecuteStep, plan: StepPlan | None, valid: ValidStep) -> StepInFlight:
        flight = _Queued(step, valid.errors, plan)
        if plan is not None:
            added = [state for state in valid.added if state.error is None]
            self._buffers.stage(plan, self._batch.arrays(plan), plan.shape, added)
            model_input, _ = self._buffers.inputs(plan.shape)
            hidden = self._model.forward(model_input, self.cache.layers)
            flight.values = _to_host(self._pooler.pool(plan, hidden))
        flight.done.record()
        return flight

    def _outcomes(self, flight: StepInFlight) -> Sequence[RowResult]:
        """None; what was pooled is entered among the results of prompts."""
        assert isinstance(flight, _Queued)
        assert flight.plan is not None
        flight.done.synchronize()
        flight.prompt_results = self._pooler.results(flight.plan, flight.values)
        return []


def pinned_upload(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy to the device that the host does not wait for."""

    def upload(values: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        return pinned.copy_(values).to(device, non_blocking=True)

    return upload


def _to_host(values: torch.Tensor | None) -> torch.Tensor | None:
    """Queue a copy that does not wait."""
    if values is None or not values.is_cuda:
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(values, non_blocking=True)
