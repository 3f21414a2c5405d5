"""Turns the coordinator's deltas into outputs for users: text, stop strings, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sempre.engine.adapters import Adapter
from sempre.engine.flat_logprobs import FlatLogprobs
from sempre.engine.frontend.logprob_rows import CandidateScores, PackedRows, RowBuffer, after_first
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.sequence_state import NewText, SequenceState
from sempre.engine.metrics import RequestSizes
from sempre.engine.outputs import Logprob, RequestMetrics, RequestOutput
from sempre.engine.proof.logprob_bits import float32_bytes
from sempre.engine.proof.output_chain import OutputChain
from sempre.engine.proof.recorder import Finished, Recorder, Recording
from sempre.engine.sampling_params import RequestOutputKind
from sempre.engine.text.detokenizer import IncrementalDetokenizer
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RecordError, RequestError
from sempre.ipc.messages import ErrorInfo, RequestOutputDelta

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class RequestState:
    """One request of a user: its sequences and its next output."""

    def __init__(
        self,
        request: PreparedRequest,
        tokenizer: Tokenizer,
        fingerprint: str,
        stream_interval: int = 1,
        *,
        keeps_packed: bool = False,
    ) -> None:
        """`keeps_packed`: log-probabilities are given as `PackedRows`."""
        self.request = request
        self.request_id = request.request_id
        self._tokenizer = tokenizer
        self._interval = max(stream_interval, request.params.stream_interval or 1)
        self._keeps_packed = keeps_packed
        self.begin(fingerprint)

    def begin(self, fingerprint: str) -> None:
        """Nothing has been generated yet, with the weights of this fingerprint."""
        request, tokenizer, params = self.request, self._tokenizer, self.request.params
        texts = tokenizer if _has_text(request, tokenizer) else None

        empty: Callable[[], PackedRows | FlatLogprobs | list[dict[int, Logprob]]]
        empty = FlatLogprobs if params.flat_logprobs else list
        if self._keeps_packed:
            empty = partial(PackedRows, texts)

        def rows() -> RowBuffer:
            return RowBuffer(texts, empty)

        self.sequences = [
            SequenceState(
                i,
                seed,
                params,
                _detokenizer(request, tokenizer),
                rows() if params.reports_logprobs else None,
                self._interval,
            )
            for i, seed in enumerate(request.seeds)
        ]
        if request.is_recorded:
            for sequence in self.sequences:
                # a request for all reports the whole distribution
                sequence.recording = Recording(OutputChain(), OutputChain() if params.logprobs == -1 else None)
        self.prompt_rows = None if params.prompt_logprobs is None else rows()
        candidates = params.prompt_logprob_token_ids
        self.candidate_scores = None if candidates is None else CandidateScores(candidates)
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self._num_running = len(self.sequences)
        self.fingerprint = fingerprint
        self._prompt_logprobs_taken = False
        self.holds_rows = params.reports_logprobs or self._scores_prompt
        """log-probabilities may pile up"""

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return self._num_running == 0

    def end_sequence(self) -> None:
        """Count one more sequence as ended."""
        self._num_running -= 1

    @property
    def gives_deltas(self) -> bool:
        """Whether each output holds only what is new."""
        return self.request.params.output_kind is RequestOutputKind.DELTA

    @property
    def num_held(self) -> int:
        """Log-probabilities that are held; in a stream of deltas, also the tokens."""
        num_held = 0 if self.prompt_rows is None else self.prompt_rows.num_entries
        num_held += 0 if self.candidate_scores is None else self.candidate_scores.num_entries
        num_held += sum([sequence.num_logprobs for sequence in self.sequences])
        if self.gives_deltas:
            num_held += sum([sequence.num_new_tokens for sequence in self.sequences])
        return num_held

    @property
    def error(self) -> ErrorInfo | None:
        """The error of the first sequence that failed."""
        return next((sequence.error for sequence in self.sequences if sequence.error is not None), None)

    def take_output(self, kind: RequestOutputKind | None = None) -> RequestOutput | None:
        """Return the next output in the form `kind` (default: the parameters'), or None if none is ready.

        While sequences run, an output holds the updated ones; FINAL_ONLY waits for all and holds all.
        """
        kind = self.request.params.output_kind if kind is None else kind
        if kind is RequestOutputKind.FINAL_ONLY:
            if not self.finished:
                return None
            due = self.sequences
        else:
            due = [sequence for sequence in self.sequences if sequence.has_news]
            if not due or self._waits_for_prompt():
                return None
        only_new = kind is RequestOutputKind.DELTA
        prompt_logprobs, candidate_scores = self._take_prompt_logprobs(only_new=only_new)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[sequence.take(only_new=only_new) for sequence in due],
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            fingerprint=self.fingerprint,
            lora_request=None if self.request.adapter is None else self.request.adapter.request,
            pooled=self.sequences[0].pooled,
            prompt_token_id_logprobs=candidate_scores,
        )

    def take_texts(self) -> list[NewText] | None:
        """Return what is new in each sequence; None, taking nothing, if `take_output` has more to tell than text."""
        if self.holds_rows or not self.gives_deltas:
            return None
        due = []
        for sequence in self.sequences:
            if sequence.has_news:
                if sequence.finish_reason is not None:
                    return None
                due.append(sequence)
        return [sequence.take_text() for sequence in due]

    @property
    def _scores_prompt(self) -> bool:
        return self.prompt_rows is not None or self.candidate_scores is not None

    def _take_prompt_logprobs(
        self, *, only_new: bool
    ) -> tuple[Sequence[dict[int, Logprob] | None] | None, npt.NDArray[np.float32] | None]:
        """Of the prompt's own tokens, and of its candidates."""
        if not self._scores_prompt or (only_new and self._prompt_logprobs_taken):
            return None, None
        self._prompt_logprobs_taken = True
        own, scores = None, None
        if self.prompt_rows is not None:
            own = after_first(self.prompt_rows.take() if only_new else self.prompt_rows.everything())
        if self.candidate_scores is not None:
            scores = self.candidate_scores.matrix()
            if only_new:
                self.candidate_scores.clear()
        return own, scores

    def _waits_for_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still missing. The first sequence computes them; another one may
        have its first token earlier, from the prefix cache or on another replica."""
        if self._prompt_logprobs_taken or self.sequences[0].finish_reason is not None:
            return False
        if self.candidate_scores is not None and not self.candidate_scores.is_complete:
            return True
        return self.prompt_rows is not None and len(self.prompt_rows) < len(self.request.prompt_token_ids) - 1


@dataclass(slots=True)
class Processed:
    """Result of a batch of deltas."""

    updated: list[RequestState] = field(default_factory=list)
    """Updated requests, each once, in the order of the deltas."""
    stopped_ids: list[str] = field(default_factory=list)
    """Sequences that a stop string ended here: the coordinator must abort them."""


class OutputProcessor:
    """The unfinished requests of one engine. Finished requests are forgotten at once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        fingerprint: Callable[[Adapter | None], str],
        stream_interval: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        """`fingerprint`: of outputs with an adapter, or with none. `stream_interval`: tokens between two outputs of a
        sequence, after the first. `recorder` makes the receipts of requests that have them."""
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._stream_interval = stream_interval
        self._fingerprint = fingerprint
        self._requests: dict[str, RequestState] = {}
        self._sequences: dict[str, tuple[RequestState, SequenceState]] = {}
        self.sizes = RequestSizes()

    @property
    def num_unfinished(self) -> int:
        """Number of unfinished requests."""
        return len(self._requests)

    def is_in_use(self, request_id: str, n: int) -> bool:
        """Whether an unfinished request has this id, or a sequence has one of the `n` ids derived from it."""
        names = [request_id] if n == 1 else [f"{request_id}_{i}" for i in range(n)]
        return request_id in self._requests or any(name in self._sequences for name in names)

    def add(self, request: PreparedRequest, *, keeps_packed: bool = False) -> RequestState:
        """Track `request`; `keeps_packed` as in RequestState. Raises RequestError if its id is in use."""
        if self.is_in_use(request.request_id, len(request.sequences)):
            raise RequestError(
                f"request_id {request.request_id!r} is in use by an unfinished request.",
                parameter="request_id",
                value=request.request_id,
                request_id=request.request_id,
            )
        state = RequestState(
            request,
            self._tokenizer,
            self._fingerprint(request.adapter),
            self._stream_interval,
            keeps_packed=keeps_packed,
        )
        self._track(state)
        first = request.sequences[0]
        if first.pooling is None:
            self.sizes.begun(len(first.prompt_token_ids), len(request.sequences), first.params.max_tokens)
        return state

    def _track(self, state: RequestState) -> None:
        self._requests[state.request_id] = state
        for spec, sequence in zip(state.request.sequences, state.sequences, strict=True):
            self._sequences[spec.request_id] = (state, sequence)

    def withdraw(self) -> tuple[list[RequestState], list[str]]:
        """Take all unfinished requests back, to `begin_again`; also return the ids of their unfinished sequences, which
        the coordinator must abort. Raises RequestError, and changes nothing, if one is a stream of deltas."""
        states = list(self._requests.values())
        for state in states:
            if state.gives_deltas:
                raise RequestError(
                    f"running='restart': request {state.request_id} is a stream of deltas, which cannot be taken back.",
                    parameter="running",
                    request_id=state.request_id,
                )
        return states, self.forget([state.request_id for state in states])

    def begin_again(self, states: Iterable[RequestState]) -> None:
        """Track requests that were taken back, from their beginning."""
        for state in states:
            state.begin(self._fingerprint(state.request.adapter))
            self._track(state)

    def rename(self) -> None:
        """Unfinished requests, of which nothing has been generated, have the current fingerprint."""
        for state in self._requests.values():
            state.fingerprint = self._fingerprint(state.request.adapter)

    def process(self, deltas: Iterable[RequestOutputDelta]) -> Processed:
        """Apply deltas in order. Late deltas of aborted sequences are dropped."""
        processed = Processed()
        updated: dict[RequestState, None] = {}
        for delta in deltas:
            entry = self._sequences.get(delta.request_id)
            if entry is None:
                continue
            state, sequence = entry
            if self._apply(state, sequence, delta):
                processed.stopped_ids.append(delta.request_id)
            updated[state] = None
            if sequence.finish_reason is not None:
                if sequence.recording is not None and sequence.error is None:
                    self._record(state, sequence, sequence.recording)
                if sequence.pooled is None:
                    self.sizes.ended(sequence.num_tokens)
                state.end_sequence()
                del self._sequences[delta.request_id]
                if state.finished:
                    state.metrics.finished_time = time.time()
                    del self._requests[state.request_id]
        processed.updated = list(updated)
        return processed

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """Drop requests; return the ids of their unfinished sequences, which the coordinator must abort."""
        sequence_ids = []
        for request_id in request_ids:
            state = self._requests.pop(request_id, None)
            if state is None:
                continue
            for spec in state.request.sequences:
                if self._sequences.pop(spec.request_id, None) is not None:
                    sequence_ids.append(spec.request_id)
        return sequence_ids

    def end_aborted(self, request_id: str) -> tuple[RequestState | None, list[str]]:
        """End a request with finish_reason `abort`; return it and its sequences, which the coordinator must abort."""
        state = self._requests.get(request_id)
        if state is None:
            return None, []
        sequence_ids = [spec.request_id for spec in state.request.sequences if spec.request_id in self._sequences]
        self.process(RequestOutputDelta(request_id=name, finish_reason="abort") for name in sequence_ids)
        return state, sequence_ids

    def _record(self, state: RequestState, sequence: SequenceState, recording: Recording) -> None:
        """Make the receipt of a sequence that has ended; one that cannot be written fails this sequence alone."""
        assert self._recorder is not None
        try:
            sequence.receipt = self._recorder.receipt(_finished(state, sequence, recording))
        except RecordError as error:
            sequence.finish_reason, sequence.error = "error", describe(error)

    def _apply(self, state: RequestState, sequence: SequenceState, delta: RequestOutputDelta) -> bool:
        # Siblings share one prompt: the first one's report counts for the request.
        if delta.prompt_logprobs is not None and sequence.index == 0:
            if state.prompt_rows is not None:
                state.prompt_rows.add(delta.prompt_logprobs, delta.prompt_logprobs.num_rows)
            if state.candidate_scores is not None:
                state.candidate_scores.add(delta.prompt_logprobs)
        if delta.num_cached_tokens and sequence.index == 0:
            state.num_cached_tokens = delta.num_cached_tokens
        if delta.time_in_queue is not None and state.metrics.time_in_queue is None:
            state.metrics.time_in_queue = delta.time_in_queue
        if state.metrics.first_token_time is None and delta.token_ids:
            state.metrics.first_token_time = time.time()
        return sequence.apply(delta)


def _finished(state: RequestState, sequence: SequenceState, recording: Recording) -> Finished:
    """What the receipt of a sequence that has ended is made of."""
    assert sequence.finish_reason is not None
    return Finished(
        request=state.request,
        index=sequence.index,
        token_ids=sequence.token_ids,
        recording=recording,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        finished_time=time.time(),
        pooled=None if sequence.pooled is None else float32_bytes(sequence.pooled),
    )


def _has_text(request: PreparedRequest, tokenizer: Tokenizer) -> bool:
    return request.params.detokenize and tokenizer.makes_text


def _detokenizer(request: PreparedRequest, tokenizer: Tokenizer) -> IncrementalDetokenizer | None:
    params = request.params
    if not _has_text(request, tokenizer):
        return None
    return IncrementalDetokenizer(
        tokenizer,
        skip_special_tokens=params.skip_special_tokens,
        stop=params.stop_strings,
        include_stop_str_in_output=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
        prompt_token_ids=request.prompt_token_ids,
    )
