"""One sequence of a request: its tokens, text, log-probabilities and recording, as deltas arrive."""

from __future__ import annotations

from msgspec import Struct

from sempre.engine.frontend.logprob_rows import RowBuffer, floats, own_logprobs
from sempre.engine.outputs import CompletionOutput
from sempre.engine.proof.recorder import Recording
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.text.detokenizer import IncrementalDetokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import ErrorInfo, RequestOutputDelta


class NewText(Struct, gc=False):
    """What is new in a sequence that goes on and of which only text is reported."""

    index: int
    seed: int
    text: str
    num_tokens: int


class SequenceState:
    """One sequence of a request: everything generated, and how much of it was returned.

    tokens and text:  [0, _taken) returned | [_taken, len) new

    Without stop strings the text is not needed earlier, so tokens are decoded when they are returned, all at once.
    """

    def __init__(
        self,
        index: int,
        seed: int,
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer | None,
        rows: RowBuffer | None,
        interval: int = 1,
    ):
        """`rows`: for log-probabilities, if requested. `interval`: new tokens per output after the first; the last
        output may have fewer."""
        self.index = index
        self.finish_reason: str | None = None
        self.error: ErrorInfo | None = None
        self.pooled: list[float] | None = None
        self.recording: Recording | None = None
        """for its receipt, if it is to have one"""
        self.receipt: str | None = None
        self._seed = seed
        self._detokenizer = detokenizer
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._rows = rows
        self._cumulative_logprob = 0.0
        self._stop_reason: int | str | None = None
        self._decodes_late = detokenizer is not None and not params.stop_strings
        self._num_decoded = 0
        self._text_ended = False
        self._taken_tokens = 0
        self._taken_pieces = 0
        self._has_news = False
        self._interval = interval

    @property
    def has_news(self) -> bool:
        """Whether enough tokens arrived since the last `take`."""
        is_enough = not self._taken_tokens or self.num_new_tokens >= self._interval or self.finish_reason is not None
        return self._has_news and is_enough

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self._token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that have not been taken."""
        return len(self._token_ids) - self._taken_tokens

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities that are held."""
        return 0 if self._rows is None else self._rows.num_entries

    def apply(self, delta: RequestOutputDelta) -> bool:
        """Add new tokens; return whether a stop string ended the sequence before the coordinator did."""
        token_ids = delta.token_ids
        finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        stopped_here = False
        if self._detokenizer is not None and not self._decodes_late:
            update = self._detokenizer.update(
                token_ids, finished=finish_reason is not None, stop_token=finish_reason == "stop"
            )
            if update.delta:
                self._text.append(update.delta)
            if update.stop_reason is not None:
                stopped_here = finish_reason is None
                finish_reason, stop_reason = "stop", update.stop_reason
                token_ids = token_ids[: update.num_tokens]
        self._token_ids += token_ids
        if self._rows is not None or self.recording is not None:
            self._add_logprobs(delta, len(token_ids))
        self.finish_reason, self._stop_reason, self.error = finish_reason, stop_reason, delta.error
        if delta.pooled is not None:
            self.pooled = floats("RequestOutputDelta.pooled", delta.pooled)
        self._has_news = self._has_news or bool(token_ids) or finish_reason is not None
        return stopped_here

    def _add_logprobs(self, delta: RequestOutputDelta, count: int) -> None:
        num_rows = 0 if delta.logprobs is None else delta.logprobs.num_rows
        if num_rows < count:
            raise RequestError(
                f"the worker reported log-probabilities of {num_rows} tokens, and {count} were sampled.",
                parameter="logprobs",
                request_id=delta.request_id,
            )
        if delta.logprobs is None:
            return
        if self._rows is not None:
            self._rows.add(delta.logprobs, count)
            for logprob in own_logprobs(delta.logprobs, count):
                self._cumulative_logprob += logprob
        if self.recording is not None:
            self.recording.add(delta.token_ids[:count], delta.logprobs)

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far; not to be changed."""
        return self._token_ids

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or token id that ended the sequence."""
        return self._stop_reason

    def take(self, *, only_new: bool) -> CompletionOutput:
        """Return everything so far, or only what is new since the last call."""
        if self._decodes_late:
            self._decode()
        first_token = self._taken_tokens if only_new else 0
        first_piece = self._taken_pieces if only_new else 0
        self._taken_tokens, self._taken_pieces = len(self._token_ids), len(self._text)
        self._has_news = False
        return CompletionOutput(
            index=self.index,
            text="".join(self._text[first_piece:]),
            token_ids=self._token_ids[first_token:],
            cumulative_logprob=None if self._rows is None else self._cumulative_logprob,
            logprobs=None if self._rows is None else self._rows.take() if only_new else self._rows.everything(),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            seed=self._seed,
            error=None if self.error is None else f"{self.error.type}: {self.error.message}",
            receipt=self.receipt,
        )

    def take_text(self) -> NewText:
        """Return only the text and the number of tokens that are new since the last call."""
        if self._decodes_late:
            self._decode()
        text, num_tokens = "".join(self._text[self._taken_pieces :]), len(self._token_ids) - self._taken_tokens
        self._taken_tokens, self._taken_pieces = len(self._token_ids), len(self._text)
        self._has_news = False
        return NewText(self.index, self._seed, text, num_tokens)

    def _decode(self) -> None:
        """Decode the tokens that arrived since the last call."""
        assert self._detokenizer is not None
        ended = self.finish_reason is not None
        if self._text_ended or (not ended and self._num_decoded == len(self._token_ids)):
            return
        token_ids = self._token_ids[self._num_decoded :]
        self._num_decoded, self._text_ended = len(self._token_ids), ended
        text = self._detokenizer.take_all(token_ids, ends=ended, stop_token=self.finish_reason == "stop")
        if text:
            self._text.append(text)
