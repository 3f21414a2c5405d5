"""Pools prompts on a CPU, each step when it is submitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sempre.ipc.messages import ExecuteStep
from sempre.workers.input_batch import StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.pooling import Pooler
from sempre.workers.runner import ModelRunner, StepInFlight
from sempre.workers.sampling import GrammarCompiler, RowResult
from sempre.workers.step_validation import StepLimits, ValidStep
from sempre.workers.steps import StepArrays, step_input


class CpuPoolingRunner(ModelRunner):
    """One replica's model, cache, pooler, and the requests it knows."""

    def __init__(
        self, model: CausalLM, cache: PagedKvCache, grammars: GrammarCompiler, limits: StepLimits, *, rank: int
    ) -> None:
        super().__init__(model, cache, grammars, limits, None, rank)
        self._pooler = Pooler(
            model, torch.float32, num_slots=self._batch.num_slots, max_num_seqs=limits.max_num_seqs, rank=rank
        )

    def step_done(self) -> bool:
        return True

    def _update_requests(self, step: ExecuteStep, valid: ValidStep) -> None:
        if self._batch.num_slots > self._pooler.num_slots:
            self._pooler.grow_slots(self._batch.num_slots)

    def _start(self, step: ExecuteStep, plan: StepPlan | None, valid: ValidStep) -> StepInFlight:
        flight = StepInFlight(step, valid.errors, plan)
        if plan is not None:
            arrays = StepArrays(*map(torch.from_numpy, self._batch.arrays(plan)))
            hidden = self._model.forward(step_input(arrays, plan.shape), self.cache.layers)
            flight.prompt_results = self._pooler.results(plan, self._pooler.pool(plan, hidden))
        return flight

    def _outcomes(self, flight: StepInFlight) -> Sequence[RowResult]:
        return []
