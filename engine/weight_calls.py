"""`LLM` and `AsyncLLM`: the calls that replace the weights of a running engine."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from os import PathLike

from sempre.engine.client import AsyncEngineClient
from sempre.engine.frontend.frontend import updated_fingerprint
from sempre.engine.frontend.new_weights import (
    NamedTensors,
    NewWeights,
    Running,
    check_running,
    weights_of_folder,
    weights_of_tensors,
)
from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.frontend.pacing import Pace, Pacer
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.session import Reply
from sempre.engine.lora_calls import AsyncLoraLLM, LoraLLM
from sempre.engine.output_stream import OutputStream
from sempre.ipc.messages import AbortRequests, ClientCommand, UpdateWeights, UpdateWeightsReply


class WeightsLLM(LoraLLM):
    """Base class of `LLM`."""

    @abstractmethod
    def _replace_weights(self, weights: NewWeights, running: Running) -> None:
        """Give them to all workers. Raises their error."""

    def load_weights(self, path: str | PathLike[str], *, running: Running = "finish") -> None:
        """Replace the model's weights by those of a folder with safetensors, which must stay there while they are used.

        All workers take them, or none: tensors that are missing, surplus or of another shape or dtype raise
        TensorMismatch, and the old weights stay. They are stored as the old ones are. The prefix cache is emptied, and
        the fingerprint names the new weights. Unfinished requests finish with the old weights, or begin again with the
        new ones (`running="restart"`, refused for a stream of deltas, which cannot be taken back). A worker that dies
        later comes back with the new weights. Adapters and draft models stay as they are.
        """
        check_running(running)
        self._replace_weights(weights_of_folder(path), running)

    def update_weights(self, named_tensors: NamedTensors, *, running: Running = "finish") -> None:
        """Like `load_weights`, of all tensors of the model by their names in the checkpoint. They are written to a
        temporary folder first, where each worker reads them."""
        check_running(running)
        weights = weights_of_tensors(named_tensors)
        try:
            self._replace_weights(weights, running)
        except BaseException:
            weights.remove()
            raise


class AsyncWeightsLLM(AsyncLoraLLM):
    """Base class of `AsyncLLM`."""

    _pacer: Pacer
    _streams: dict[str, OutputStream]
    _call_ids: Iterator[int]

    @abstractmethod
    async def _ask(self, command: ClientCommand, call_id: int, kind: type[Reply]) -> Reply:
        """Send a command, and wait for its reply."""

    @abstractmethod
    def _connected(self) -> AsyncEngineClient:
        """The client of the running engine. Raises EngineDeadError."""

    @abstractmethod
    def _send(self, command: ClientCommand) -> None:
        """Send a command, unless the engine has ended."""

    def _start_pacing(self, requests: Sequence[PreparedRequest]) -> None:
        """Send requests, as many as there is room for."""
        client = self._connected()
        pace = Pace.of(client.ready, self._frontend.config.data_parallel_size)
        self._pacer.start(requests, pace, client.send)

    async def load_weights(self, path: str | PathLike[str], *, running: Running = "finish") -> None:
        """Replace the model's weights by those of a folder, like `LLM.load_weights`; requests that come meanwhile wait
        and get the new ones."""
        check_running(running)
        await self._replace_weights(weights_of_folder(path), running)

    async def update_weights(self, named_tensors: NamedTensors, *, running: Running = "finish") -> None:
        """Replace the model's weights by these tensors, like `LLM.update_weights`."""
        check_running(running)
        weights = await asyncio.to_thread(weights_of_tensors, named_tensors)
        try:
            await self._replace_weights(weights, running)
        except BaseException:
            weights.remove()
            raise

    async def _replace_weights(self, weights: NewWeights, running: Running) -> None:
        """Give them to all workers. Raises their error."""
        await self._begun()
        processor = self._frontend.processor
        withdrawn: list[RequestState] = []
        if running == "restart":
            withdrawn, sequence_ids = processor.withdraw()
            self._pacer.drop(sequence_ids)
            if sequence_ids:
                self._send(AbortRequests(request_ids=sequence_ids))
        # what came before gets the old weights, also where it waits here
        self._pacer.send_all()
        try:
            command = UpdateWeights(call_id=next(self._call_ids), path=weights.path)
            reply = await self._ask(command, command.call_id, UpdateWeightsReply)
            self._frontend.use_weights(weights, updated_fingerprint(reply))
        finally:
            # a stream may have been closed meanwhile
            withdrawn = [state for state in withdrawn if state.request_id in self._streams]
            processor.begin_again(withdrawn)
            if withdrawn:
                self._start_pacing([state.request for state in withdrawn])
