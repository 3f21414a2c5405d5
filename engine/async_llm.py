"""The asynchronous Python interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Self, Unpack

from sempre.engine.adapters import LoRARequest, Requested
from sempre.engine.arguments import EngineKeywords, parse_arguments
from sempre.engine.client import AsyncEngineClient, launch_async
from sempre.engine.client.engine_process import ended_by
from sempre.engine.frontend.beam_search import BeamSearches, BeamSearchParams
from sempre.engine.frontend.frontend import Frontend, call_results, engine_metrics, limits_of, worker_call
from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.frontend.pacing import Pacer
from sempre.engine.frontend.progress import StartupNotice, log_progress
from sempre.engine.frontend.prompts import PromptType
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.session import REPLIES, Reply, check_refused
from sempre.engine.frontend.tenants import of_tenant
from sempre.engine.health import EngineHealth, answered_health, unhealthy
from sempre.engine.metrics import Metric
from sempre.engine.output_stream import OutputStream, StreamControl, check_prompt_logprobs
from sempre.engine.outputs import BeamSearchOutput, RequestOutput
from sempre.engine.restart_calls import AsyncRestartLLM
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.shared_task import SharedTask
from sempre.engine.vllm_settings import refuse_values
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import again
from sempre.ipc.errors import EngineDeadError, ProtocolError
from sempre.ipc.messages import (
    AbortRequests,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    EngineReady,
    GetHealth,
    GetMetrics,
    HealthReply,
    MetricsReply,
    OutputsReady,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    TenantSpec,
)

# Events handled before readers of outputs run: readers slower than the engine then get the tokens of several steps
# at once, which costs little more than those of one step.
_MOST_EVENTS_AT_ONCE = 8


class AsyncLLM(AsyncRestartLLM):
    """A model with its coordinator and workers, for one event loop.

        async with AsyncLLM("tiny") as engine:
            async for output in engine.generate("It is a truth", SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)

    Takes the keywords of `LLM`. `start`, `async with` or the first call that is awaited launches the processes. Any
    number of tasks may generate at the same time.
    """

    def __init__(self, model: str | PathLike[str], **keywords: Unpack[EngineKeywords]) -> None:
        """Check the keywords and find the model; start nothing. Raises the errors of `LLM`."""
        self._frontend = Frontend(parse_arguments(model, keywords))
        self._client: AsyncEngineClient | None = None
        self._reader: asyncio.Task[None] | None = None
        self._launching = SharedTask(self._launch)
        self._failure: EngineDeadError | None = None
        self._has_ended = asyncio.Event()
        self._starts_again = False
        self._call_ids = count()
        self._streams: dict[str, OutputStream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._pacer = Pacer()

    async def start(self) -> None:
        """Launch the engine and wait until it is ready. Raises the errors of `LLM`."""
        if self._client is not None or self._failure is not None or self._launching.is_running:
            raise EngineDeadError("this AsyncLLM was started before; make a new one")
        await self._launch()

    async def _launch(self) -> None:
        self._client = await self._launch_client()
        self._frontend.connect(self._client.ready)
        self._reader = asyncio.create_task(self._read(self._client), name="sempre reader")

    async def _launch_client(self) -> AsyncEngineClient:
        with StartupNotice(self._frontend.config.model) as notice:
            return await launch_async(self._frontend.config, notice.phase_ended)

    async def restart(self) -> None:
        """Replace an engine that has ended; request numbers continue. Raises the errors of `start`.

        Close the streams of the old engine first.
        """
        former = self._client
        if self._failure is None or former is None:
            raise EngineDeadError("only an engine that has ended can be started again")
        self._starts_again = True
        try:
            former.close()
            client = await launch_async(self._frontend.config, log_progress)
        finally:
            self._starts_again = False
        if limits_of(client.ready) != limits_of(former.ready):
            self._frontend.connect(client.ready)
        self._client, self._failure = client, None
        self._has_ended.clear()
        self._reader = asyncio.create_task(self._read(client), name="sempre reader")

    async def wait_for_end(self) -> EngineDeadError:
        """Wait until the engine has ended; return the error that says why."""
        await self._has_ended.wait()
        assert self._failure is not None
        return again(self._failure)

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt and yield outputs as they come, in the form that `output_kind` sets.

        A slow reader gets fewer, larger outputs; nothing piles up. Closing the generator aborts the request. An
        adapter is loaded if it is not yet. The other keywords are vLLM's and must be None; `priority` needs
        scheduling_policy="priority".

        Raises RequestError for a refused request or one that failed, EngineDeadError when the engine died.
        """
        await self._begun()
        self._connected()
        refuse_values(
            prompt_text=prompt_text,
            tokenization_kwargs=tokenization_kwargs,
            trace_headers=trace_headers,
            data_parallel_rank=data_parallel_rank,
        )
        params = self._or_default(sampling_params)
        [adapter] = await self._load(lora_request)
        builder = self._frontend.builder
        stream = self._follow([builder.build(prompt, params, priority, request_id=request_id, adapter=adapter)])
        try:
            while outputs := await stream.next():
                yield outputs[0]
        finally:
            stream.close()

    def stream(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        max_held_logprobs: int | None = None,
        record: bool | None = None,
        lora_request: Requested = None,
        tenant: TenantSpec | None = None,
    ) -> OutputStream:
        """Start all prompts or none, and return their outputs as one stream, with receipts if `record`. An adapter must
        be loaded (`add_lora`). Requests of a `tenant` wait for its turn among those of others.

        With `max_held_logprobs`, log-probabilities are given packed, as sequences that unpack what is read, and the
        stream fails if it holds more of them before the outputs are complete. Raises the errors of `LLM.generate`.
        """
        self._connected()
        params, adapters = self._or_default(sampling_params), self._loaded(lora_request)
        requests = self._frontend.builder.build_all(prompts, params, priority, record=record, adapters=adapters)
        return self._follow(of_tenant(requests, tenant), max_held_logprobs)

    async def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Return the most probable continuations of each prompt, like `LLM.beam_search`."""
        await self._begun()
        search = self.beam_searches(prompts, params)
        await search.run(lambda *call: self.stream(*call, record=False), concurrency_limit)
        self.record_beams(search)
        return search.outputs(self._frontend.tokenizer)

    def beam_searches(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams, given: SamplingParams | None = None
    ) -> BeamSearches:
        """Check the prompts of a search that the caller runs. Raises the errors of `beam_search`."""
        self._connected()
        return BeamSearches(self._frontend.builder, prompts, params, given=given)

    async def abort(self, request_id: str) -> None:
        """End a request: its generator yields a last output with finish_reason `abort`. Unknown ids are ignored."""
        client = self._connected()
        state, sequence_ids = self._frontend.processor.end_aborted(request_id)
        if sequence_ids:
            self._pacer.drop(sequence_ids)
            client.send(AbortRequests(request_ids=sequence_ids))
        if state is not None:
            self._wake(state)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> list[object]:
        """Call a public method of every worker by name, like `LLM.collective_rpc`."""
        call_id = next(self._call_ids)
        command = worker_call(call_id, method, args, kwargs)
        try:
            async with asyncio.timeout(timeout):
                return call_results(await self._ask(command, call_id, CallWorkersReply), method)
        except TimeoutError:
            raise TimeoutError(f"no answer to CallWorkers within {timeout} s") from None

    async def get_metrics(self) -> list[Metric]:
        """Return the current values of the engine's counters and gauges."""
        call_id = next(self._call_ids)
        reply = await self._ask(GetMetrics(call_id=call_id), call_id, MetricsReply)
        return engine_metrics(reply, self._frontend)

    async def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache. While requests run, do nothing and return False."""
        call_id = next(self._call_ids)
        return (await self._ask(ResetPrefixCache(call_id=call_id), call_id, ResetPrefixCacheReply)).done

    async def health(self, timeout_s: float = 2.0) -> EngineHealth:
        """Return the health of the engine and each worker; an unhealthy engine is not an error here.

        A coordinator that does not answer within `timeout_s` counts as a problem.
        """
        if self._failure is not None:
            return unhealthy("restarting" if self._starts_again else "dead", str(self._failure))
        client = self._client
        if client is None:
            return unhealthy("starting", "the engine is not ready yet")
        call_id = next(self._call_ids)
        asking = asyncio.create_task(self._ask(GetHealth(call_id=call_id), call_id, HealthReply))
        return await answered_health(asking, self._frontend.config, lambda: client.outage, timeout_s)

    async def check_health(self, timeout_s: float = 2.0) -> None:
        """Raise EngineUnhealthy, naming the rank, unless all workers are ready, send heartbeats and are not stuck."""
        (await self.health(timeout_s)).check()

    def check_form(self, params: SamplingParams) -> None:
        """Check the structured output of `params` here, in any thread. Raises RequestError."""
        self._frontend.builder.check_form(params)

    @property
    def config(self) -> EngineConfig:
        """The settings in use."""
        return self._frontend.config

    @property
    def ready(self) -> EngineReady:
        """What the engine reported at its start: limits, seconds of each start-up phase, process ids of workers."""
        return self._connected().ready

    def shutdown(self) -> None:
        """End the workers and the coordinator; running generators raise EngineDeadError. Can be called twice."""
        error = EngineDeadError("this AsyncLLM was shut down")
        self._fail(error)
        self._launching.cancel(error)
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._client is not None:
            self._client.close()
            self._client = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        reader = self._reader
        self.shutdown()
        if reader is not None:
            await asyncio.gather(reader, return_exceptions=True)

    async def _begun(self) -> None:
        if self._client is None and self._failure is None:
            await self._launching.run()

    def _connected(self) -> AsyncEngineClient:
        if self._failure is not None:
            raise again(self._failure)
        if self._client is None:
            raise EngineDeadError("this AsyncLLM is not started; use `async with` or `await engine.start()`")
        return self._client

    def _follow(self, requests: list[PreparedRequest], max_held_logprobs: int | None = None) -> OutputStream:
        client = self._connected()
        packed = max_held_logprobs is not None
        check_prompt_logprobs(requests, client.ready.vocab_size, max_held_logprobs)
        names = [request.request_id for request in requests]
        states: list[RequestState] = []
        try:
            states += [self._frontend.processor.add(request, keeps_packed=packed) for request in requests]
            self._start_pacing(requests)
        except BaseException:
            self._drop([state.request_id for state in states])
            raise
        stream = OutputStream(states, StreamControl(lambda: self._drop(names), self._send), max_held_logprobs)
        self._streams.update(dict.fromkeys(names, stream))
        return stream

    def _drop(self, request_ids: list[str]) -> None:
        """Forget requests and abort the unfinished ones."""
        for name in request_ids:
            self._streams.pop(name, None)
        sequence_ids = self._frontend.processor.forget(request_ids)
        self._pacer.drop(sequence_ids)
        if sequence_ids:
            self._send(AbortRequests(request_ids=sequence_ids))

    def _send(self, command: ClientCommand) -> None:
        if self._client is not None and self._failure is None:
            self._client.send(command)

    async def _ask(self, command: ClientCommand, call_id: int, kind: type[Reply]) -> Reply:
        await self._begun()
        client = self._connected()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call_id] = future
        try:
            client.send(command)
            return await future
        finally:
            del self._replies[call_id]

    async def _read(self, client: AsyncEngineClient) -> None:
        try:
            for num_events in count(1):
                if num_events % _MOST_EVENTS_AT_ONCE == 0:
                    await asyncio.sleep(0)
                try:
                    self._take(client, await client.receive())
                except ProtocolError as error:
                    # A frame is lost and could belong to any current request; later requests are not affected.
                    self._fail_waiting(error)
        # If the reader ended silently, all generators would wait for ever, so each of them raises its error.
        except Exception as error:
            self._fail(error)

    def _take(self, client: AsyncEngineClient, event: ClientEvent) -> None:
        match event:
            case OutputsReady(outputs=outputs):
                self._pacer.note(outputs)
                processed = self._frontend.processor.process(outputs)
                if processed.stopped_ids:
                    client.send(AbortRequests(request_ids=processed.stopped_ids, finish_reason="stop"))
                for state in processed.updated:
                    self._wake(state)
            case _ if isinstance(event, REPLIES):
                future = self._replies.get(event.call_id)
                if future is not None and not future.done():
                    future.set_result(event)
            case _:
                check_refused(event)

    def _wake(self, state: RequestState) -> None:
        stream = self._streams.get(state.request_id)
        if stream is not None:
            stream.wake(state)

    def _fail(self, error: BaseException) -> None:
        """Raise `error` in all current and later callers; only the first error counts."""
        if self._failure is None:
            self._failure = again(ended_by(error))
            self._has_ended.set()
        self._fail_waiting(self._failure)

    def _fail_waiting(self, error: BaseException) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(again(error))
