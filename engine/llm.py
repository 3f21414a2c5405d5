"""The synchronous Python interface."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, Self, Unpack

from sempre.engine.adapters import Adapter, Requested
from sempre.engine.arguments import EngineKeywords, parse_arguments
from sempre.engine.client import launch
from sempre.engine.frontend.beam_search import BeamSearches, BeamSearchParams
from sempre.engine.frontend.engine_view import EngineView
from sempre.engine.frontend.frontend import (
    Frontend,
    call_results,
    engine_metrics,
    raise_failure,
    updated_fingerprint,
    worker_call,
)
from sempre.engine.frontend.new_weights import NewWeights, Running
from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.frontend.progress import GenerationProgress, StartupNotice, UseTqdm, search_progress
from sempre.engine.frontend.prompts import PromptType, TokensPrompt
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.session import Session, SleepCommand
from sempre.engine.metrics import Metric
from sempre.engine.outputs import BeamSearchOutput, RequestOutput
from sempre.engine.pooling import PoolingParams
from sempre.engine.pooling_calls import Prompts
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.engine.sleep_calls import SleepLLM
from sempre.engine.text.messages import ContentFormat
from sempre.engine.vllm_settings import refuse_values
from sempre.ipc.errors import EngineDeadError
from sempre.ipc.messages import (
    CallWorkersReply,
    GetMetrics,
    MetricsReply,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    SleepTag,
)

Message = Mapping[str, Any]


class LLM(SleepLLM):
    """A model with its coordinator and workers.

    Keywords are the fields of `EngineConfig` and `FrontendConfig`. Close it with `shutdown` or `with`; it also
    closes when it is garbage-collected or the program ends. One thread may use an object at a time; a second one
    gets a RuntimeError, since the order of requests would depend on timing. `AsyncLLM` serves many tasks.
    """

    def __init__(self, model: str | PathLike[str], **keywords: Unpack[EngineKeywords]) -> None:
        """Start the engine and wait until it is ready.

        Raises TypeError for an unknown keyword, ConfigError for a refused value, ModelError for an unusable model,
        StartupError when a process does not become ready, SeedMismatch, InvarianceError.
        """
        arguments = parse_arguments(model, keywords)

        def load_frontend() -> None:
            self._frontend = Frontend(arguments)

        with StartupNotice(arguments.engine.model) as notice:
            client = launch(arguments.engine, notice.phase_ended, meanwhile=load_frontend)
        # Runs once: on shutdown, when this object is garbage-collected, or at the end of the program.
        self._closer = weakref.finalize(self, client.close)
        self._frontend.connect(client.ready)
        self._ready = client.ready
        self._session = Session(client, self._frontend.processor)
        self._enqueued: list[_Running] = []

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Requested = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; return outputs in the order of `prompts`.

        Without parameters, the model's defaults apply; a list holds one per prompt. `priority` is one number for all
        prompts or one each (lower is sooner, under scheduling_policy="priority"). `lora_request` is the adapter of all
        prompts, or a list with one or None each; what is not loaded yet is loaded. `tokenization_kwargs` and
        `mm_processor_kwargs` must be empty. All prompts are checked before anything is computed. A request that fails
        later ends with finish_reason `error` and its text in `outputs[i].error`; the others continue. Ctrl-C aborts the
        running requests and leaves the engine usable.

        Raises RequestError (a ValueError) for a refused prompt or parameter, EngineDeadError when the engine died.
        """
        self._check_open()
        refuse_values(tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs)
        params = self._or_default(sampling_params)
        return self._complete(prompts, params, priority, use_tqdm, adapters=self._load(lora_request))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Requested = None,
        priority: int | Sequence[int] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_content_format: ContentFormat | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several, using the model's chat template.

        Raises RequestError for messages the template refuses, ConfigError when the model has no template, and the
        errors of `generate`.
        """
        self._check_open()
        refuse_values(tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs)
        prompts = self._rendered(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            chat_template_content_format=chat_template_content_format,
        )
        params = self._or_default(sampling_params)
        return self._complete(prompts, params, priority, use_tqdm, adapters=self._load(lora_request))

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        lora_request: object = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Return the most probable continuations of each prompt, `beam_width` of them, best first.

        At most `concurrency_limit` prompts are searched at a time. Raises the errors of `generate`, also when a request
        fails while it runs.
        """
        self._check_open()
        refuse_values(lora_request=lora_request)
        with self._session.exclusive():
            search = BeamSearches(self._frontend.builder, prompts, params)
        rounds, outputs = search.rounds(concurrency_limit), None
        with search_progress(use_tqdm, len(search.searches)) as show, suppress(StopIteration):
            while True:
                outputs = self._complete(rounds.send(outputs), search.params, None, False, record=False)
                show(search.num_finished)
        self.record_beams(search)
        return search.outputs(self._frontend.tokenizer)

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        lora_request: Requested = None,
        **without_effect: object,
    ) -> list[str]:
        """Start each prompt and return the request ids at once; `wait_for_completion` returns the outputs.

        The unused keywords of `generate` are allowed here as well. Raises the errors of `generate`.
        """
        self._check_open()
        without_effect.pop("use_tqdm", None)
        refuse_values(**without_effect)
        params, adapters = self._or_default(sampling_params), self._load(lora_request)
        with self._session.exclusive():
            requests = self._frontend.builder.build_all(prompts, params, priority, adapters=adapters)
            with self._dropped_on_error(requests):
                self._enqueued.append(_Running(requests, self._session.submit(requests)))
        return [request.request_id for request in requests]

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        **template: Any,
    ) -> list[str]:
        """Like `enqueue`, for conversations; also takes the template keywords of `chat`."""
        self._check_open()
        return self.enqueue(self._rendered(messages, **template), sampling_params, priority=priority)

    def wait_for_completion(self, *, use_tqdm: UseTqdm = True) -> list[RequestOutput]:
        """Return the outputs of all requests enqueued since the last call, in order."""
        self._check_open()
        with self._session.exclusive():
            enqueued, self._enqueued = self._enqueued, []
            requests = [request for each in enqueued for request in each.requests]
            states = [state for each in enqueued for state in each.states]
            with self._dropped_on_error(requests):
                return self._finished(_Running(requests, states), use_tqdm)

    def stream(self, prompt: PromptType, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt and yield outputs as they come, in the form that `output_kind` sets.

        Closing the iterator aborts the request. Raises RequestError, also when the request fails while it runs.
        """
        self._check_open()
        params = self._or_default(sampling_params)
        with self._session.exclusive():
            request = self._frontend.builder.build(prompt, params)
        return self._stream(request)

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> list[object]:
        """Call a public method of every worker by name; return one result per worker, in rank order.

        `timeout` is in seconds. Raises the worker's error, RequestError for an error of another kind, TimeoutError.
        """
        self._check_open()
        call_id = self._session.next_call_id()
        command = worker_call(call_id, method, args, kwargs)
        return call_results(self._session.ask(command, call_id, CallWorkersReply, timeout), method)

    def get_metrics(self) -> list[Metric]:
        """Return the current values of the engine's counters and gauges."""
        self._check_open()
        call_id = self._session.next_call_id()
        reply = self._session.ask(GetMetrics(call_id=call_id), call_id, MetricsReply)
        return engine_metrics(reply, self._frontend)

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache. While requests run, do nothing and return False."""
        self._check_open()
        call_id = self._session.next_call_id()
        return self._session.ask(ResetPrefixCache(call_id=call_id), call_id, ResetPrefixCacheReply).done

    def _replace_weights(self, weights: NewWeights, running: Running) -> None:
        self._check_open()
        try:
            reply = self._session.update_weights(weights.path, restarts=running == "restart")
            self._frontend.use_weights(weights, updated_fingerprint(reply))
        finally:
            self._session.begin_again()

    def _change_sleep(self, make_command: Callable[[int], SleepCommand]) -> list[SleepTag]:
        self._check_open()
        return self._session.change_sleep(make_command)

    def get_world_size(self, include_dp: bool = True) -> int:
        """Return the number of workers in all replicas or in one."""
        return self._ready.world_size if include_dp else self._frontend.config.replica_size

    @property
    def llm_engine(self) -> EngineView:
        """The settings in use under vLLM's names: `model_config.max_model_len`, `cache_config.num_gpu_blocks`, …"""
        return EngineView(self._frontend, self._ready)

    def shutdown(self) -> None:
        """End the workers and the coordinator. Can be called twice."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _complete(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: SamplingParams | Sequence[SamplingParams],
        priority: int | Sequence[int] | None,
        use_tqdm: UseTqdm,
        record: bool | None = None,
        adapters: Sequence[Adapter | None] = (None,),
    ) -> list[RequestOutput]:
        self._check_open()
        with self._session.exclusive():
            builder = self._frontend.builder
            requests = builder.build_all(prompts, params, priority, record=record, adapters=adapters)
            return self._run(requests, use_tqdm)

    def _pool(self, prompts: Prompts, params: PoolingParams | None, use_tqdm: UseTqdm) -> list[RequestOutput]:
        self._check_open()
        with self._session.exclusive():
            return self._run(self._frontend.builder.build_pooled(prompts, params or PoolingParams()), use_tqdm)

    def _rendered(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **template: Any
    ) -> list[TokensPrompt]:
        conversations = [messages] if _is_conversation(messages) else messages
        return [
            self._frontend.render_chat(conversation, **template)  # type: ignore[arg-type]
            for conversation in conversations
        ]

    def _run(self, requests: list[PreparedRequest], use_tqdm: UseTqdm) -> list[RequestOutput]:
        with self._dropped_on_error(requests):
            return self._finished(_Running(requests, self._session.submit(requests)), use_tqdm)

    @contextmanager
    def _dropped_on_error(self, requests: list[PreparedRequest]) -> Iterator[None]:
        """Abort the unfinished requests if the body raises."""
        try:
            yield
        except BaseException as error:
            self._session.drop(requests, error)
            raise

    def _finished(self, running: _Running, use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Wait for all outputs."""
        outputs: dict[str, RequestOutput | None] = {request.request_id: None for request in running.requests}
        num_running = len(outputs)
        progress = GenerationProgress(use_tqdm, sum(len(request.sequences) for request in running.requests))
        try:
            news = running.states
            while num_running:
                for state in news:
                    # A stream that is read between two calls has its own reader.
                    if state.request_id not in outputs:
                        continue
                    progress.count(state)
                    if state.finished:
                        output = state.take_output(RequestOutputKind.FINAL_ONLY)
                        assert output is not None
                        outputs[output.request_id] = output
                        num_running -= 1
                        progress.finish(output)
                news = self._session.receive() if num_running else []
        finally:
            progress.close()
        return [output for output in outputs.values() if output is not None]

    def _stream(self, request: PreparedRequest) -> Iterator[RequestOutput]:
        with self._dropped_on_error([request]):
            with self._session.exclusive():
                state = self._session.submit([request])[0]
            while True:
                output = state.take_output()
                if output is None:
                    with self._session.exclusive():
                        self._session.receive()
                    continue
                raise_failure(state)
                yield output
                if output.finished:
                    return

    def _check_open(self) -> None:
        if not self._closer.alive:
            raise EngineDeadError("this LLM was shut down; make a new one")


class _Running(NamedTuple):
    """Requests that have been sent."""

    requests: list[PreparedRequest]
    states: list[RequestState]


def _is_conversation(messages: object) -> bool:
    """Whether this is one list of messages, not a list of such lists."""
    return isinstance(messages, Sequence) and not any(isinstance(message, Sequence) for message in messages)
