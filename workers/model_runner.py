"""Runs steps: admits and forgets requests, computes their tokens in one forward pass, samples where a step reaches the
end of what is known.

# R requests in the step, T tokens, V vocabulary, H hidden size
"""

from __future__ import annotations

import torch

from sempre.ipc.messages import NOT_READY, ExecuteStep, SampledTokens, ScheduledRequest
from sempre.workers.admission import Admission, StepLimits
from sempre.workers.input_batch import InputBatch, StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS, PromptLogprobs
from sempre.workers.sampling import GrammarCompiler, RowResult, Sampler
from sempre.workers.verification import drafts_in_place, verified


class ModelRunner:
    """One replica's model, cache, sampler, and the requests it knows."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_draft_tokens: int = 0,
        rank: int,
    ) -> None:
        self.cache = cache
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self._model = model
        self._grammars = grammars
        self._rank = rank
        self._batch = InputBatch(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_model_len=max_model_len,
            num_slots=max_num_seqs,
            grammars=grammars,
        )
        limits = StepLimits(
            max_model_len, max_num_seqs, max_num_batched_tokens, model.spec.vocab_size, max_draft_tokens
        )
        self._admission = Admission(self._batch, limits, rank)
        self._sampler = Sampler()
        rows = max(max_num_seqs + max_draft_tokens, PROMPT_LOGPROB_ROWS)
        self._rows_RH = torch.empty(rows, model.spec.hidden_size, dtype=torch.float32, device="cpu")
        self._logits_RV = torch.empty(rows, model.spec.vocab_size, dtype=torch.float32, device="cpu")
        self._prompt_logprobs = PromptLogprobs(model, self._sampler, self._logits_RV, rank)

    def execute(self, step: ExecuteStep) -> list[SampledTokens]:
        """One result per scheduled request, in order. Raises MessageMalformed when the step itself is wrong."""
        admitted = self._admission.admit(step)
        errors = admitted.errors
        computed = iter(self._compute(admitted.healthy) if admitted.healthy else [])
        return [
            SampledTokens(request_id=item.request_id, error=errors[item.request_id])
            if item.request_id in errors
            else next(computed)
            for item in step.scheduled
        ]

    def revise(self, request_id: str, start: int, token_ids: list[int]) -> None:
        """The tokens of a known request from `start` on are these, and not those that were sampled."""
        self._batch.revise(self._batch.get(request_id), start, token_ids)

    def _compute(self, scheduled: list[ScheduledRequest]) -> list[SampledTokens]:
        batch_step = self._batch.build(scheduled)
        self._grammars.patience.begin_step()
        _prepare_forms(batch_step.plan)
        hidden = self._model.forward(batch_step.model_input, self.cache.layers)
        plan = batch_step.plan
        results = self._sample(plan, hidden, all_rows=batch_step.model_input.outputs is None)
        for index, (item, state) in enumerate(zip(scheduled, plan.states, strict=True)):
            if state.sampling.params.prompt_logprobs is not None:
                first_row = int(plan.first_rows[index])
                results[index] = self._prompt_logprobs.add(results[index], item, state, first_row, hidden)
        for state, result in zip(plan.states, results, strict=True):
            # a failed request stays failed: a step for it may be on its way already
            if result.error is None or result.error.type != NOT_READY:
                state.error = result.error
        return results

    def _sample(self, plan: StepPlan, hidden: torch.Tensor, *, all_rows: bool) -> list[SampledTokens]:
        """One result per request of the step; the tokens sampled are appended to the sequences.

        `hidden` [T, H] if it has all rows of the step, else [M, H] those that sample.
        """
        results = [SampledTokens(request_id=state.request_id) for state in plan.states]
        sampled = plan.sampled_rows
        if not sampled.rows.size:
            return results
        if all_rows:
            out = self._rows_RH[: sampled.rows.size]
            hidden = torch.index_select(hidden, 0, torch.from_numpy(sampled.rows), out=out)
        logits_RV = self._model.logits(hidden, self._logits_RV[: sampled.rows.size])
        requests = sampled.requests.tolist()
        states = [plan.states[index].sampling for index in requests]
        with drafts_in_place(plan):
            outcomes = self._sampler.sample(logits_RV, states, sampled.positions.tolist())
        by_request: dict[int, list[RowResult]] = {}
        for index, outcome in zip(requests, outcomes, strict=True):
            by_request.setdefault(index, []).append(outcome)
        for index, rows in by_request.items():
            state = plan.states[index]
            result = verified(state.request_id, plan.scheduled[index].draft_token_ids, rows, self._rank)
            for token_id in result.token_ids:
                self._batch.append(state, token_id)
            results[index] = result
        return results


def _prepare_forms(plan: StepPlan) -> None:
    """Have the forms of the rows that sample worked out beside the forward pass."""
    sampled = plan.sampled_rows
    for index, position in zip(sampled.requests.tolist(), sampled.positions.tolist(), strict=True):
        grammar = plan.states[index].sampling.grammar
        if grammar is not None:
            grammar.prepare(position)
