"""Runs steps on a CPU, each when it is submitted.

# R requests in the step, T tokens, V vocabulary, H hidden size
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace

from sempre.ipc.messages import ExecuteStep, SampledTokens
from sempre.kernels.sampling import RAW_LOGPROBS, Reports
from sempre.workers.input_batch import StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS
from sempre.workers.runner import ModelRunner, StepInFlight
from sempre.workers.sampling import GrammarCompiler, RowResult, Sampler
from sempre.workers.step_validation import StepLimits, ValidStep
from sempre.workers.steps import StepArrays, step_input
from sempre.workers.verification import drafts_in_place


@dataclass
class ComputedRows(StepInFlight):
    """What became of the sampled rows."""

    outcomes: Sequence[RowResult] = field(default_factory=list)
    hidden_digests: list[bytes] = field(default_factory=list)
    """of each, where other ranks have the same, or take it over"""
    received_digests: list[bytes] = field(default_factory=list)
    """of each, as the stage before passed it on"""


class CpuModelRunner(ModelRunner):
    """One replica's model, cache, sampler, and the requests it knows."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        limits: StepLimits,
        *,
        rank: int,
        reports: Reports = RAW_LOGPROBS,
    ) -> None:
        self._sampler = Sampler(reports)
        rows = max(limits.max_num_seqs + limits.max_draft_tokens, PROMPT_LOGPROB_ROWS)
        self._rows_RH = torch.empty(rows, model.spec.hidden_size, dtype=torch.float32, device="cpu")
        self._logits_RV = torch.empty(rows, model.spec.vocab_size, dtype=torch.float32, device="cpu")
        super().__init__(model, cache, grammars, limits, (self._sampler, self._logits_RV), rank)

    def step_done(self) -> bool:
        return True

    def revise(self, request_id: str, start: int, token_ids: list[int]) -> None:
        """Replace the tokens of a known request from `start` on, which were sampled."""
        self._batch.revise(self._batch.get(request_id), start, token_ids)

    def _update_requests(self, step: ExecuteStep, valid: ValidStep) -> None:
        return

    def _start(self, step: ExecuteStep, plan: StepPlan | None, valid: ValidStep) -> StepInFlight:
        flight = ComputedRows(step, valid.errors, plan)
        if plan is not None:
            self._compute(flight, plan)
        return flight

    def _compute(self, flight: ComputedRows, plan: StepPlan) -> None:
        self._grammars.patience.begin_step()
        _prepare_grammars(plan)
        hidden = self._forward(plan)
        flight.outcomes = self._sample(flight, plan, hidden)
        self._score_prompts(flight, plan, hidden)

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        """The final hidden states of all rows [T, H] if the plan reads them, else of the sampled ones [S, H]."""
        arrays = StepArrays(*map(torch.from_numpy, self._batch.arrays(plan)))
        return self._model.forward(step_input(arrays, plan.shape), self.cache.layers)

    def _outcomes(self, flight: StepInFlight) -> Sequence[RowResult]:
        assert isinstance(flight, ComputedRows)
        return flight.outcomes

    def _results(self, flight: StepInFlight, plan: StepPlan) -> dict[str, SampledTokens]:
        results = super()._results(flight, plan)
        assert isinstance(flight, ComputedRows)
        return with_digests(results, flight, plan)

    def _sampled(self, plan: StepPlan, hidden: torch.Tensor) -> torch.Tensor:
        """The sampled rows [S, H] of `hidden`, which is [T, H] if it has all rows of the step."""
        if not plan.shape.reads_all_rows:
            return hidden
        rows = torch.from_numpy(plan.sampled_rows.rows)
        return torch.index_select(hidden, 0, rows, out=self._rows_RH[: len(rows)])

    def _sample(self, flight: ComputedRows, plan: StepPlan, hidden: torch.Tensor) -> Sequence[RowResult]:
        """One result per row that samples; `hidden` is [T, H] if it has all rows of the step, else [S, H]."""
        sampled = plan.sampled_rows
        count = sampled.rows.size
        if not count:
            return []
        hidden = self._sampled(plan, hidden)
        if not self._model.parallel.is_alone:
            flight.hidden_digests = row_digests(hidden)
        logits_RV = self._model.logits(hidden, self._logits_RV[:count])
        states = [plan.states[index].sampling for index in sampled.requests.tolist()]
        with drafts_in_place(plan):
            return self._sampler.sample(logits_RV, states, sampled.positions.tolist())


def row_digests(rows: torch.Tensor) -> list[bytes]:
    """8 bytes for each row of float32 [S, H], that tell it from others."""
    return [hashlib.blake2b(row.numpy().data, digest_size=8).digest() for row in rows]


def with_digests(results: dict[str, SampledTokens], flight: ComputedRows, plan: StepPlan) -> dict[str, SampledTokens]:
    """The results by request id, with the digests of their rows."""
    hidden, received = (_by_request(plan, rows) for rows in (flight.hidden_digests, flight.received_digests))
    return results | {
        name: replace(results[name], hidden_digest=digest, received_digest=received.get(name, b""))
        for name, digest in hidden.items()
    }


def _by_request(plan: StepPlan, digests: list[bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for index, digest in zip(plan.sampled_rows.requests.tolist(), digests, strict=False):
        request_id = plan.states[index].request_id
        found[request_id] = found.get(request_id, b"") + digest
    return found


def _prepare_grammars(plan: StepPlan) -> None:
    """Start computing the grammar masks of the sampled rows alongside the forward pass."""
    sampled = plan.sampled_rows
    for index, position in zip(sampled.requests.tolist(), sampled.positions.tolist(), strict=True):
        grammar = plan.states[index].sampling.grammar
        if grammar is not None:
            grammar.prepare(position)
