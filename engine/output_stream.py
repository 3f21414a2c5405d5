"""The outputs of one or more requests, for one reader in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from sempre.engine.frontend.frontend import raise_failure
from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.sequence_state import NewText
from sempre.engine.outputs import RequestOutput
from sempre.ipc.error_info import again
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import PauseRequests, ResumeRequests

# Tokens and log-probabilities of one stream that wait for its reader before the engine pauses its requests.
MOST_AHEAD = 1 << 15


class StreamControl(NamedTuple):
    """What a stream asks of its engine."""

    close: Callable[[], None]
    """forget the requests, and abort the unfinished ones"""
    send: Callable[[PauseRequests | ResumeRequests], None]


class OutputStream:
    """Made by `AsyncLLM.stream`. A slow reader gets fewer, larger outputs, and the engine waits for one that is far
    behind; nothing piles up.

    Close it when done: that aborts the unfinished requests. A reader wakes once for all updates of one step.
    """

    def __init__(
        self, states: Sequence[RequestState], control: StreamControl, max_held_logprobs: int | None = None
    ) -> None:
        """`max_held_logprobs`: more of them before an output is complete end the stream with a RequestError."""
        self._states = states
        self._control = control
        self._max_held = max_held_logprobs
        self._closed = False
        # of requests with updates that their reader may leave for longer than a step
        self._held: dict[RequestState, int] = {}
        self._num_held = 0
        self._paused: dict[str, None] = {}
        # a dict, to keep the order of updates
        self._updated: dict[RequestState, None] = {}
        self._unfinished = {state.request_id for state in states}
        self._sleep: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    @property
    def requests(self) -> list[PreparedRequest]:
        """The requests, in the order of their prompts: token ids, and the seed of each sequence."""
        return [state.request for state in self._states]

    @property
    def num_sequences(self) -> int:
        """Number of sequences in all requests."""
        return sum(len(state.sequences) for state in self._states)

    async def next(self) -> list[RequestOutput]:
        """Wait for updates; return one output per request that has one, in the form that its parameters set.

        An empty list means that all requests have finished. Raises RequestError if a request failed, EngineDeadError
        if the engine died.
        """
        while updated := await self.updated():
            outputs = [output for state in updated if (output := self.take(state)) is not None]
            if outputs:
                return outputs
        return []

    async def updated(self) -> Collection[RequestState]:
        """Wait for updates; return the requests that have some, for `take` or `take_texts`. None means that all have
        finished. Raises EngineDeadError if the engine died."""
        while not self._updated:
            if not self._unfinished:
                return ()
            if self._failure is not None:
                raise again(self._failure)
            self._sleep = asyncio.get_running_loop().create_future()
            await self._sleep
        updated, self._updated = self._updated, {}
        if self._paused:
            self._resume()
        return updated

    async def finished(self) -> list[RequestOutput]:
        """Wait for the last output of each request, in the order of the prompts, and close. Raises the errors of
        `next`."""
        last: dict[str, RequestOutput] = {}
        try:
            while outputs := await self.next():
                last.update((output.request_id, output) for output in outputs)
        finally:
            self.close()
        return [last[state.request_id] for state in self._states]

    def close(self) -> None:
        """Abort the unfinished requests; can be called twice."""
        if not self._closed:
            self._closed = True
            self._control.close()

    def abort(self, error: BaseException) -> None:
        """Close, and raise `error` in the reader at once; pending outputs are dropped."""
        self.close()
        self._updated.clear()
        self.fail(error)

    def wake(self, state: RequestState) -> None:
        """Called by the engine: a request has an update."""
        self._updated[state] = None
        if self._sleep is not None and not state.holds_rows:
            # what the reader takes now need not be counted
            self._wake_up()
            return
        num_held = self._count(state)
        if self._max_held is not None and num_held > self._max_held:
            self.abort(_too_many_logprobs(num_held, self._max_held))
        # a reader that sleeps is not behind: it may wait for more before it can take anything
        elif num_held > MOST_AHEAD and self._sleep is None and state.gives_deltas:
            self._pause(state)
        self._wake_up()

    def fail(self, error: BaseException) -> None:
        """Called by the engine: no more updates will come."""
        self._failure = error
        self._wake_up()

    def _wake_up(self) -> None:
        sleep, self._sleep = self._sleep, None
        if sleep is not None and not sleep.done():
            sleep.set_result(None)

    def _count(self, state: RequestState) -> int:
        """Update and return how much waits for the reader."""
        num_held = state.num_held
        self._num_held += num_held - self._held.get(state, 0)
        self._held[state] = num_held
        return self._num_held

    def _pause(self, state: RequestState) -> None:
        """The reader is behind: pause the sequences of a request that run."""
        sequences = zip(state.request.sequences, state.sequences, strict=True)
        running = [spec.request_id for spec, sequence in sequences if sequence.finish_reason is None]
        ahead = [name for name in running if name not in self._paused]
        if ahead:
            self._paused.update(dict.fromkeys(ahead))
            self._control.send(PauseRequests(request_ids=ahead))

    def _resume(self) -> None:
        """The reader takes all that has come."""
        paused, self._paused = self._paused, {}
        if paused and not self._closed:
            self._control.send(ResumeRequests(request_ids=list(paused)))

    def take_texts(self, state: RequestState) -> list[NewText] | None:
        """Return what is new in an updated request if that is only text; otherwise None, and `take` has it."""
        texts = state.take_texts()
        if state in self._held:
            self._count(state)
        return texts

    def take(self, state: RequestState) -> RequestOutput | None:
        """Return the output of an updated request, if it has one. Raises RequestError if the request failed."""
        output = state.take_output()
        if state in self._held:
            self._count(state)
        if output is not None:
            for choice in output.outputs:
                if choice.error is not None:
                    raise_failure(state)
            if output.finished:
                self._unfinished.discard(output.request_id)
        return output


def check_prompt_logprobs(requests: Sequence[PreparedRequest], vocab_size: int, limit: int | None) -> None:
    """Raise RequestError for prompts with more log-probabilities than a stream may hold."""
    num_held = 0
    for request in requests:
        num_held += sum(map(len, request.params.prompt_logprob_token_ids or ()))
        most = request.params.prompt_logprobs
        if most is not None:
            num_held += (len(request.prompt_token_ids) - 1) * (vocab_size if most == -1 else 1 + most)
    if limit is not None and num_held > limit:
        raise _too_many_logprobs(num_held, limit, "prompt_logprobs")


def _too_many_logprobs(num_held: int, limit: int, parameter: str = "logprobs") -> RequestError:
    return RequestError(
        f"The answer has at least {num_held} log-probabilities, and at most {limit} may be held until it is complete "
        "(--max-held-logprobs). Ask for fewer, send fewer prompts, or stream.",
        parameter=parameter,
        value=num_held,
    )
