"""The outputs of one or more requests, for one reader in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sempre.engine.frontend.frontend import raise_failure
from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.outputs import RequestOutput
from sempre.ipc.error_info import again


class OutputStream:
    """Made by `AsyncLLM.stream`. A slow reader gets fewer, larger outputs; nothing piles up.

    Close it when done: that aborts the unfinished requests. A reader wakes once for all updates of one step.
    """

    def __init__(self, states: Sequence[RequestState], close: Callable[[], None]) -> None:
        self._states = states
        self._close = close
        self._closed = False
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
        while True:
            if self._updated:
                updated, self._updated = self._updated, {}
                outputs = [output for state in updated if (output := self._take(state)) is not None]
                if outputs:
                    return outputs
            if not self._unfinished:
                return []
            if self._failure is not None:
                raise again(self._failure)
            self._sleep = asyncio.get_running_loop().create_future()
            await self._sleep

    async def finished(self) -> list[RequestOutput]:
        """Wait for the last output of each request, in the order of the prompts. Raises the errors of `next`."""
        last: dict[str, RequestOutput] = {}
        while outputs := await self.next():
            last.update((output.request_id, output) for output in outputs)
        return [last[state.request_id] for state in self._states]

    def close(self) -> None:
        """Abort the unfinished requests; can be called twice."""
        if not self._closed:
            self._closed = True
            self._close()

    def abort(self, error: BaseException) -> None:
        """Close, and raise `error` in the reader at once; pending outputs are dropped."""
        self.close()
        self._updated.clear()
        self.fail(error)

    def wake(self, state: RequestState) -> None:
        """Called by the engine: a request has an update."""
        self._updated[state] = None
        self._wake_up()

    def fail(self, error: BaseException) -> None:
        """Called by the engine: no more updates will come."""
        self._failure = error
        self._wake_up()

    def _wake_up(self) -> None:
        sleep, self._sleep = self._sleep, None
        if sleep is not None and not sleep.done():
            sleep.set_result(None)

    def _take(self, state: RequestState) -> RequestOutput | None:
        output = state.take_output()
        if output is not None:
            for choice in output.outputs:
                if choice.error is not None:
                    raise_failure(state)
            if output.finished:
                self._unfinished.discard(output.request_id)
        return output
