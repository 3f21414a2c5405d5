"""Runs steps: admits and forgets requests, computes their tokens in one forward pass, samples where a step reaches the
end of what is known.

# R requests in the step, T tokens, V vocabulary, H hidden size
"""

from __future__ import annotations

import numpy as np
import torch
from msgspec.structs import replace

from sempre.ipc.messages import ExecuteStep, SampledTokens, ScheduledRequest
from sempre.workers.admission import Admission, StepLimits
from sempre.workers.input_batch import InputBatch, StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.decoder import Decoder
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS, PromptLogprobs
from sempre.workers.sampling import GrammarCompiler, Sampler


class ModelRunner:
    """One replica's decoder, cache, sampler, and the requests it knows."""

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        rank: int,
    ) -> None:
        self.cache = cache
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self._decoder = decoder
        self._rank = rank
        self._batch = InputBatch(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_model_len=max_model_len,
            num_slots=max_num_seqs,
            grammars=grammars,
        )
        limits = StepLimits(max_model_len, max_num_seqs, max_num_batched_tokens, decoder.spec.vocab_size)
        self._admission = Admission(self._batch, limits, rank)
        self._sampler = Sampler()
        rows = max(max_num_seqs, PROMPT_LOGPROB_ROWS)
        self._rows_RH = torch.empty(rows, decoder.spec.hidden_size)
        self._logits_RV = torch.empty(rows, decoder.spec.vocab_size)
        self._prompt_logprobs = PromptLogprobs(decoder, self._sampler, self._logits_RV, rank)

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

    def _compute(self, scheduled: list[ScheduledRequest]) -> list[SampledTokens]:
        batch_step = self._batch.build(scheduled)
        hidden_TH = self._decoder.forward(batch_step.model_input, self.cache.layers)
        plan = batch_step.plan
        results = self._sample(plan, hidden_TH)
        for index, (item, state) in enumerate(zip(scheduled, plan.states, strict=True)):
            if state.sampling.params.prompt_logprobs is not None:
                first_row = int(plan.first_rows[index])
                results[index] = self._prompt_logprobs.add(results[index], item, state, first_row, hidden_TH)
        for state, result in zip(plan.states, results, strict=True):
            # a failed request stays failed: a step for it may be on its way already
            state.error = result.error
        return results

    def _sample(self, plan: StepPlan, hidden_TH: torch.Tensor) -> list[SampledTokens]:
        """One result per request of the step; the tokens sampled are appended to the sequences."""
        results = [SampledTokens(request_id=state.request_id) for state in plan.states]
        sampling = np.flatnonzero(plan.samples)
        if not sampling.size:
            return results
        rows = torch.from_numpy(plan.last_rows[sampling])
        hidden_RH = torch.index_select(hidden_TH, 0, rows, out=self._rows_RH[: sampling.size])
        logits_RV = self._decoder.logits(hidden_RH, self._logits_RV[: sampling.size])
        states = [plan.states[index] for index in sampling.tolist()]
        positions = plan.context[sampling].tolist()
        outcomes = self._sampler.sample(logits_RV, [state.sampling for state in states], positions)
        for index, state, outcome in zip(sampling.tolist(), states, outcomes, strict=True):
            if outcome.token_id is not None:
                self._batch.append(state, outcome.token_id)
            results[index] = SampledTokens(
                request_id=state.request_id,
                token_ids=[] if outcome.token_id is None else [outcome.token_id],
                logprobs=outcome.logprobs,
                error=None if outcome.error is None else replace(outcome.error, rank=self._rank),
            )
        return results
