"""What every runner does with a step before computing it: forget, check, add new requests, set failed ones aside."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np

from sempre.ipc.error_info import describe
from sempre.ipc.errors import MessageMalformed, RequestError
from sempre.ipc.messages import ErrorInfo, ExecuteStep, NewRequest, ScheduledRequest
from sempre.workers.input_batch import InputBatch, RequestState
from sempre.workers.slot_validation import SlotValidation
from sempre.workers.steps import StepShape


class StepLimits(NamedTuple):
    """What a step and its requests may demand of a worker."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    max_draft_tokens: int = 0
    num_state_slots: int = 0
    num_adapter_slots: int = 0

    @property
    def largest_step(self) -> StepShape:
        """No step has larger arrays than this one."""
        return StepShape(
            num_requests=self.max_num_seqs,
            num_rows=max(self.max_num_batched_tokens, 2 * self.max_num_seqs),
            num_sampled=self.max_num_seqs + self.max_draft_tokens,
            max_query_len=self.max_num_batched_tokens,
            max_context_len=self.max_model_len,
            max_sampled=1 + self.max_draft_tokens,
            has_states=self.num_state_slots > 0,
            has_adapters=self.num_adapter_slots > 0,
        )


class ValidStep(NamedTuple):
    """A step that may be computed."""

    healthy: list[ScheduledRequest]
    errors: dict[str, ErrorInfo]
    """why the other scheduled requests are not computed, by id"""
    added: list[RequestState]
    """new requests"""
    removed: list[RequestState]
    """requests forgotten"""


class StepValidation:
    """Keeps `batch` in line with the coordinator's view."""

    def __init__(self, batch: InputBatch, limits: StepLimits, rank: int) -> None:
        self._batch = batch
        self._limits = limits
        self._rank = rank
        self._slots = SlotValidation(limits.num_state_slots)

    def admit(self, step: ExecuteStep) -> ValidStep:
        """Raises MessageMalformed when the step itself is wrong."""
        batch = self._batch
        gone = [batch.remove(request_id) for request_id in step.finished_request_ids]
        self._check(step)
        added = [batch.add(new, self._refusal(new)) for new in step.new_requests]
        states = [batch.get(item.request_id) for item in step.scheduled]
        errors = {state.request_id: state.error for state in states if state.error is not None}
        healthy = [item for item in step.scheduled if item.request_id not in errors] if errors else step.scheduled
        self._slots.record(healthy)
        return ValidStep(healthy, errors, added, [state for state in gone if state is not None])

    def _check(self, step: ExecuteStep) -> None:
        known = {new.request_id for new in step.new_requests}
        if len(known) < len(step.new_requests) or any(request_id in self._batch for request_id in known):
            again = [new.request_id for new in step.new_requests if new.request_id in self._batch]
            raise _malformed("new_requests", "ids that are not known yet", f"{again or 'one id twice'}")
        ids = [item.request_id for item in step.scheduled]
        distinct = set(ids)
        unknown = distinct - known - self._batch.ids()
        if unknown:
            raise _malformed("scheduled.request_id", "known requests", f"unknown ids {sorted(unknown)}")
        if len(distinct) < len(ids):
            raise _malformed("scheduled.request_id", "each request once", "one id twice")
        limits = self._limits
        if len(ids) > limits.max_num_seqs:
            raise _malformed("scheduled", f"at most max_num_seqs={limits.max_num_seqs} requests", str(len(ids)))
        num_tokens = sum([item.num_tokens for item in step.scheduled])
        if num_tokens > limits.max_num_batched_tokens:
            limit = f"at most max_num_batched_tokens={limits.max_num_batched_tokens} tokens"
            raise _malformed("scheduled.num_tokens", limit, str(num_tokens))
        self._slots.check(step.scheduled)
        drafts = list(chain.from_iterable([item.draft_token_ids for item in step.scheduled]))
        if len(drafts) > limits.max_draft_tokens:
            limit = f"at most max_draft_tokens={limits.max_draft_tokens} in all"
            raise _malformed("scheduled.draft_token_ids", limit, str(len(drafts)))
        if drafts and max(drafts) >= limits.vocab_size:
            limit = f"ids less than vocab_size={limits.vocab_size}"
            raise _malformed("scheduled.draft_token_ids", limit, str(max(drafts)))

    def _refusal(self, new: NewRequest) -> ErrorInfo | None:
        """Why this request can never be computed; None if it can."""
        length, limits = len(new.token_ids), self._limits
        if not new.num_prompt_tokens <= length <= limits.max_model_len:
            expected, found = f"{new.num_prompt_tokens} to {limits.max_model_len} tokens", f"{length}"
        elif max(new.token_ids) >= limits.vocab_size:
            expected, found = f"ids less than vocab_size={limits.vocab_size}", f"{max(new.token_ids)}"
        elif (unfit := _unfit_candidates(new, limits.vocab_size)) is not None:
            message = f"prompt_candidates: expected {unfit[0]}, found {unfit[1]}."
            error = RequestError(message, parameter="prompt_logprob_token_ids", request_id=new.request_id)
            return describe(error, self._rank)
        elif (new.pooling is None) != (self._batch.pooling is None):
            task = "generates" if self._batch.pooling is None else "pools"
            message = f"pooling: the model {task}, and the request asks for the other."
            error = RequestError(message, parameter="pooling", request_id=new.request_id)
            return describe(error, self._rank)
        elif new.adapter is not None and not self._limits.num_adapter_slots:
            message = f"adapter: expected none, as the worker serves none, found {new.adapter.name!r}."
            error = RequestError(message, parameter="lora_request", request_id=new.request_id)
            return describe(error, self._rank)
        else:
            return None
        message = f"token_ids: expected {expected}, found {found}."
        error = RequestError(message, parameter="token_ids", value=found, request_id=new.request_id)
        return describe(error, self._rank)


def _unfit_candidates(new: NewRequest, vocab_size: int) -> tuple[str, str] | None:
    """What a request's candidates should be, and what they are; None if they fit its prompt and the vocabulary."""
    given = new.params.prompt_candidates
    if given is None:
        return None
    num_rows = max(new.num_prompt_tokens - 1 - given.start, 0)
    expected, found = 4 * given.width * num_rows, len(given.token_ids)
    if found != expected:
        return f"{num_rows} rows of {given.width} ids, {expected} bytes", f"{found} bytes"
    token_ids = np.frombuffer(given.token_ids, "<i4")
    unfit = token_ids[(token_ids < -1) | (token_ids >= vocab_size)]
    return (f"ids less than vocab_size={vocab_size}, or -1", f"{unfit[0]}") if unfit.size else None


def _malformed(name: str, expected: str, found: str) -> MessageMalformed:
    return MessageMalformed(f"ExecuteStep: {name}: expected {expected}, found {found}.", field=name)
