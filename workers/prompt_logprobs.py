"""Log-probabilities of prompt tokens, a slice of rows at a time.

# T tokens in the step, V vocabulary, H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from sempre.ipc.messages import LogprobRows, PromptCandidates, SampledTokens, ScheduledRequest
from sempre.workers.input_batch import RequestState
from sempre.workers.models.base import CausalLM
from sempre.workers.sampling import NoDistribution, RowError
from sempre.workers.verification import joined

# rows of logits computed at a time: bounds the memory, does not affect the result
PROMPT_LOGPROB_ROWS = 64


class PromptScorer(Protocol):
    """A sampler, on the device of the logits."""

    def prompt_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_best: int) -> LogprobRows: ...

    def candidate_logprobs(self, logits: torch.Tensor, candidates: npt.NDArray[np.int32]) -> bytes: ...


class PromptLogprobs:
    """Scores prompts; `logits_RV` is scratch of at least PROMPT_LOGPROB_ROWS rows."""

    def __init__(self, model: CausalLM, scorer: PromptScorer, logits_RV: torch.Tensor, rank: int) -> None:
        self._model = model
        self._scorer = scorer
        self._logits_RV = logits_RV
        self._rank = rank

    def score(
        self, item: ScheduledRequest, state: RequestState, first_row: int, hidden_TH: torch.Tensor
    ) -> SampledTokens:
        """Rows for the prompt positions q in [first, last] of this chunk, if any: the hidden state at q - 1 predicts q.

        `first_row` is the chunk's first row in the final hidden states.
        """
        params = state.sampling.params
        if params.first_scored_token is None:
            return SampledTokens(request_id=state.request_id)
        width = params.prompt_logprobs or 0
        start, end = item.num_computed_tokens, item.num_computed_tokens + item.num_tokens
        first = max(start + 1, item.prompt_logprobs_start, params.first_scored_token)
        last = min(end, state.num_prompt_tokens - 1)
        if first > last:
            return SampledTokens(request_id=state.request_id)
        parts = []
        for low in range(first, last + 1, PROMPT_LOGPROB_ROWS):
            high = min(low + PROMPT_LOGPROB_ROWS, last + 1)
            row = first_row + low - 1 - start
            logits = self._model.logits(hidden_TH[row : row + high - low], self._logits_RV[: high - low])
            try:
                rows = self._scorer.prompt_logprobs(logits, state.token_ids[low:high], width)
            except NoDistribution as error:
                # by position in the prompt: rows and chunks are internal
                text = f"the logits for prompt token {low + error.row} contain NaN or +inf, or nothing finite"
                info = RowError(error.operation, text).info()
                return SampledTokens(request_id=state.request_id, error=replace(info, rank=self._rank))
            if params.prompt_candidates is not None:
                rows = replace(rows, candidates=self._candidates(params.prompt_candidates, logits, low, high))
            parts.append(rows)
        return SampledTokens(request_id=state.request_id, prompt_logprobs=joined(parts))

    def _candidates(self, given: PromptCandidates, logits_RV: torch.Tensor, low: int, high: int) -> bytes:
        """Log-probabilities of the candidates for prompt tokens [low, high), whose logits these are."""
        first = max(low, 1 + given.start)
        if first >= high:
            return b""
        candidates = np.frombuffer(given.token_ids, "<i4").reshape(-1, given.width)
        chosen = candidates[first - 1 - given.start : high - 1 - given.start].astype(np.int32, copy=False)
        return self._scorer.candidate_logprobs(logits_RV[first - low :], chosen)
