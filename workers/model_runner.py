"""Runs steps: admits and forgets requests, computes their tokens in one forward pass, samples where a step reaches the
end of what is known.

# R requests in the step, T tokens, V vocabulary, H hidden size
"""

from __future__ import annotations

import numpy as np
import torch
from msgspec.structs import replace

from sempre.ipc.error_info import describe
from sempre.ipc.errors import MessageMalformed, RequestError
from sempre.ipc.messages import ErrorInfo, ExecuteStep, LogprobRows, NewRequest, SampledTokens, ScheduledRequest
from sempre.workers.input_batch import BatchStep, InputBatch, RequestState
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.decoder import Decoder
from sempre.workers.sampling import RowError, Sampler

# rows of logits computed at a time for prompt log-probabilities: bounds the memory, cannot be seen in the result
PROMPT_LOGPROB_ROWS = 64


class ModelRunner:
    """One replica's decoder, cache, sampler, and the requests it knows."""

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKvCache,
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
        self._max_num_seqs = max_num_seqs
        self._rank = rank
        self._vocab_size = decoder.spec.vocab_size
        self._batch = InputBatch(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_model_len=max_model_len,
            num_slots=max_num_seqs,
        )
        self._sampler = Sampler()
        rows = max(max_num_seqs, PROMPT_LOGPROB_ROWS)
        self._rows_RH = torch.empty(rows, decoder.spec.hidden_size)
        self._logits_RV = torch.empty(rows, self._vocab_size)

    def execute(self, step: ExecuteStep) -> list[SampledTokens]:
        """One result per scheduled request, in order. Raises MessageMalformed when the step itself is wrong."""
        for request_id in step.finished_request_ids:
            self._batch.remove(request_id)
        self._check(step)
        for new in step.new_requests:
            self._batch.add(new, self._refusal(new))
        errors = {
            item.request_id: error
            for item in step.scheduled
            if (error := self._batch.get(item.request_id).error) is not None
        }
        healthy = [item for item in step.scheduled if item.request_id not in errors]
        computed = iter(self._compute(healthy) if healthy else [])
        return [
            SampledTokens(request_id=item.request_id, error=errors[item.request_id])
            if item.request_id in errors
            else next(computed)
            for item in step.scheduled
        ]

    def _check(self, step: ExecuteStep) -> None:
        known = {new.request_id for new in step.new_requests}
        if len(known) < len(step.new_requests) or any(request_id in self._batch for request_id in known):
            again = [new.request_id for new in step.new_requests if new.request_id in self._batch]
            raise _malformed("new_requests", "ids that are not known yet", f"{again or 'one id twice'}")
        ids = [item.request_id for item in step.scheduled]
        unknown = [request_id for request_id in ids if request_id not in self._batch and request_id not in known]
        if unknown:
            raise _malformed("scheduled.request_id", "known requests", f"unknown ids {unknown}")
        if len(set(ids)) < len(ids):
            raise _malformed("scheduled.request_id", "each request once", "one id twice")
        if len(ids) > self._max_num_seqs:
            raise _malformed("scheduled", f"at most max_num_seqs={self._max_num_seqs} requests", str(len(ids)))
        num_tokens = sum(item.num_tokens for item in step.scheduled)
        if num_tokens > self.max_num_batched_tokens:
            limit = f"at most max_num_batched_tokens={self.max_num_batched_tokens} tokens"
            raise _malformed("scheduled.num_tokens", limit, str(num_tokens))

    def _refusal(self, new: NewRequest) -> ErrorInfo | None:
        """Why this request can never be computed; None when it can."""
        length = len(new.token_ids)
        if not new.num_prompt_tokens <= length <= self.max_model_len:
            expected, found = f"{new.num_prompt_tokens} to {self.max_model_len} tokens", f"{length}"
        elif max(new.token_ids) >= self._vocab_size:
            expected, found = f"ids less than vocab_size={self._vocab_size}", f"{max(new.token_ids)}"
        else:
            return None
        message = f"token_ids: expected {expected}, found {found}."
        error = RequestError(message, parameter="token_ids", value=found, request_id=new.request_id)
        return describe(error, self._rank)

    def _compute(self, scheduled: list[ScheduledRequest]) -> list[SampledTokens]:
        batch_step = self._batch.build(scheduled)
        hidden_TH = self._decoder.forward(batch_step.model_input, self.cache.layers)
        results = self._sample(batch_step, hidden_TH)
        for index, (item, state) in enumerate(zip(scheduled, batch_step.states, strict=True)):
            if state.sampling.params.prompt_logprobs is not None:
                first_row = int(batch_step.first_rows[index])
                results[index] = self._add_prompt_logprobs(results[index], item, state, first_row, hidden_TH)
        for state, result in zip(batch_step.states, results, strict=True):
            # a failed request stays failed: a step for it may be on its way already
            state.error = result.error
        return results

    def _sample(self, batch_step: BatchStep, hidden_TH: torch.Tensor) -> list[SampledTokens]:
        """One result per request of the step; the tokens sampled are appended to the sequences."""
        results = [SampledTokens(request_id=state.request_id) for state in batch_step.states]
        sampling = np.flatnonzero(batch_step.samples)
        if not sampling.size:
            return results
        rows = torch.from_numpy(batch_step.last_rows[sampling])
        hidden_RH = torch.index_select(hidden_TH, 0, rows, out=self._rows_RH[: sampling.size])
        logits_RV = self._decoder.logits(hidden_RH, self._logits_RV[: sampling.size])
        states = [batch_step.states[index] for index in sampling.tolist()]
        positions = batch_step.context[sampling].tolist()
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

    def _add_prompt_logprobs(
        self,
        result: SampledTokens,
        item: ScheduledRequest,
        state: RequestState,
        first_row: int,
        hidden_TH: torch.Tensor,
    ) -> SampledTokens:
        """With rows for the prompt positions q in [first, last] of this chunk: the hidden state at q - 1 predicts q."""
        width = state.sampling.params.prompt_logprobs
        start, end = item.num_computed_tokens, item.num_computed_tokens + item.num_tokens
        first = max(start + 1, item.prompt_logprobs_start, 1)
        last = min(end, state.num_prompt_tokens - 1)
        if width is None or first > last or result.error is not None:
            return result
        parts = []
        for low in range(first, last + 1, PROMPT_LOGPROB_ROWS):
            high = min(low + PROMPT_LOGPROB_ROWS, last + 1)
            row = first_row + low - 1 - start
            logits = self._decoder.logits(hidden_TH[row : row + high - low], self._logits_RV[: high - low])
            try:
                parts.append(self._sampler.prompt_logprobs(logits, state.token_ids[low:high], width))
            except RowError as error:
                return SampledTokens(request_id=state.request_id, error=replace(error.info(), rank=self._rank))
        return replace(result, prompt_logprobs=_joined(parts))


def _joined(parts: list[LogprobRows]) -> LogprobRows:
    """The rows of all parts, which have one width, in order."""
    return LogprobRows(
        num_rows=sum(part.num_rows for part in parts),
        width=parts[0].width,
        token_ids=b"".join(part.token_ids for part in parts),
        logprobs=b"".join(part.logprobs for part in parts),
        ranks=b"".join(part.ranks for part in parts),
    )


def _malformed(name: str, expected: str, found: str) -> MessageMalformed:
    return MessageMalformed(f"ExecuteStep: {name}: expected {expected}, found {found}.", field=name)
