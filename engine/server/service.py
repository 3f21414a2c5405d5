"""What the endpoints share: one engine, and what the server knows about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sempre.engine.async_llm import AsyncLLM
from sempre.engine.frontend.beam_search import BeamSearchParams
from sempre.engine.frontend.prompts import PromptType
from sempre.engine.output_stream import OutputStream
from sempre.engine.pooling import PoolingParams
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.server.adapters import ServedAdapters, lora_modules
from sempre.engine.server.admission import Admission
from sempre.engine.server.api_keys import api_keys
from sempre.engine.server.beams import BeamStream
from sempre.engine.server.clients import Client, KeyRing
from sempre.engine.server.config import ServerConfig, with_model_defaults
from sempre.engine.server.errors import BadRequest, Busy
from sempre.engine.server.ledger import Ledger, Place
from sempre.engine.server.limits import MAX_VALUES, check_copies
from sempre.engine.server.logprobs import TokenNames
from sempre.engine.server.metrics import ServerMetrics
from sempre.engine.server.offload import Offload
from sempre.engine.server.requests import GenerationRequest
from sempre.ipc.errors import too_long, too_many_characters

_STARTING_RETRY_S = 5
# of the ledger: at most this many for the server itself, and for each key
_COLUMNS, _COLUMNS_OF_KEY = 1024, 8
# a tokenizer's normalisation may shorten a text before encoding
_SLACK = 4


class _Admitted(NamedTuple):
    """A running HTTP request."""

    stream: OutputStream | BeamStream
    client: Client
    num_sequences: int
    """as how many it counts"""


class Service:
    """The engine that the endpoints use. Created before the engine is ready: until then requests get 503."""

    def __init__(self, engine: AsyncLLM, config: ServerConfig, place: Place | None = None) -> None:
        """`place`: which of several API processes this is. Raises ConfigError for unusable keys."""
        self.engine = engine
        given = api_keys(config)
        ledger = Ledger(place, _COLUMNS + _COLUMNS_OF_KEY * len(given))
        self.keys = KeyRing(given, ledger, shares_prefix_cache=config.share_prefix_cache)
        template = engine.chat_template if config.tool_call_parser == "auto" else None
        self.config = with_model_defaults(config, Path(engine.config.model_path), template or "")
        self.created = int(time.time())
        self.is_ready = False
        self.startup_seconds: dict[str, float] = {}
        settings = engine.config
        self.model_names = config.served_model_name or [settings.model]
        self.adapters = ServedAdapters(engine, self.model_names, lora_modules(config.lora_modules))
        self.admission = Admission(ledger, max_queued=config.max_num_queued_reqs)
        self.metrics = ServerMetrics(self.model_names[0], ledger)
        self._requests = ledger.gauge(1)
        self.offload = Offload()
        self.token_names = TokenNames(engine.get_tokenizer())
        self._streams: dict[int, _Admitted] = {}

    @property
    def served_names(self) -> list[str]:
        """What clients may name as `model`: the model's names, then those of adapters."""
        return [*self.model_names, *self.adapters.names]

    @property
    def num_requests(self) -> int:
        """Number of HTTP requests that this process answers."""
        return len(self._streams)

    @property
    def num_requests_in_all(self) -> int:
        """Number of HTTP requests that all API processes answer."""
        return int(self._requests.total())

    def _keep(self, stream: OutputStream | BeamStream, client: Client, num_sequences: int) -> None:
        self._streams[id(stream)] = _Admitted(stream, client, num_sequences)
        self._requests.own[0] = len(self._streams)

    def serve(self, startup_seconds: dict[str, float]) -> None:
        """The engine is ready: accept requests from now on."""
        ready, settings = self.engine.ready, self.engine.config
        self.admission.max_running = ready.max_num_seqs * settings.data_parallel_size
        self.startup_seconds = startup_seconds
        self.is_ready = True

    def pause(self) -> None:
        """The engine has ended: accept no requests until `serve` is called again."""
        self.is_ready = False

    def check_ready(self) -> None:
        """Raise Busy (503) while the engine starts or restarts."""
        if not self.is_ready:
            raise Busy("The engine is starting.", _STARTING_RETRY_S)

    @property
    def max_json_values(self) -> int:
        """Maximum values in a body, which may include the token ids of a prompt as long as the context."""
        return max(MAX_VALUES, 2 * self.engine.ready.max_model_len if self.is_ready else 0)

    def checked_length(self, token_ids: list[int]) -> list[int]:
        """Return a prompt's token ids. Raises BadRequest for more than the context holds, before checking any."""
        limit = self.engine.ready.max_model_len
        num_after = 1 if self.engine.ready.pooling is None else 0
        if len(token_ids) + num_after > limit:
            raise BadRequest(too_long(len(token_ids), limit, num_after), param="prompt")
        return token_ids

    def check_text(self, text: str) -> None:
        """Raise BadRequest for a text that cannot fit into the context, however it is tokenized."""
        tokenizer, limit = self.engine.get_tokenizer(), self.engine.ready.max_model_len
        if len(text) > limit * tokenizer.longest_token * _SLACK:
            raise BadRequest(too_many_characters(len(text), limit), param="prompt")

    def default_parameters(self, request: GenerationRequest) -> SamplingParams:
        """What applies where the request says nothing; the model's defaults are for sampling."""
        return SamplingParams() if request.use_beam_search else self.engine.get_default_sampling_params()

    def open(
        self,
        client: Client,
        prompts: Sequence[PromptType],
        params: SamplingParams | list[SamplingParams],
        priority: int,
        search: BeamSearchParams | None = None,
        record: bool = False,
        model: str | None = None,
    ) -> OutputStream | BeamStream:
        """Admit a client's prompts and start them; `close` must follow. Raises APIError, RequestError, EngineDeadError.

        With `search`, `params` are those of its response. `record`: make receipts even if the engine does not.
        `model`: the name of an adapter, or of the model itself.
        """
        self.check_ready()
        adapter = self.adapters.of(model)
        if adapter is not None and search is not None:
            raise BadRequest("use_beam_search is not available with an adapter.", param="use_beam_search")
        each = params if isinstance(params, list) else [params] * len(prompts)
        num_sequences = sum(prompt_params.n if search is None else search.beam_width for prompt_params in each)
        for prompt_params in each:
            check_copies(prompt_params, num_sequences)
        self._admit(client, num_sequences)
        most, salted = self.config.max_held_logprobs, client.salted(prompts)
        try:
            stream: OutputStream | BeamStream
            if search is None:
                stream = self.engine.stream(
                    salted,
                    params,
                    priority=priority,
                    max_held_logprobs=most,
                    record=record or None,
                    lora_request=adapter,
                    tenant=client.tenant,
                )
            else:
                stream = BeamStream(self.engine, salted, search, each[0], priority, client.tenant)
        except BaseException:
            self._release(client, num_sequences)
            raise
        self._keep(stream, client, num_sequences)
        return stream

    def open_pooled(
        self, client: Client, prompts: Sequence[PromptType], params: PoolingParams, priority: int
    ) -> OutputStream:
        """The same for prompts that are pooled.

        They are short work and are sent to the engine in parts, so a call counts as at most one step's sequences.
        """
        self.check_ready()
        count = min(len(prompts), max(1, self.admission.max_running))
        self._admit(client, count)
        try:
            stream = self.engine.pool(client.salted(prompts), params, priority=priority, tenant=client.tenant)
        except BaseException:
            self._release(client, count)
            raise
        self._keep(stream, client, count)
        return stream

    def client_of(self, stream: OutputStream | BeamStream) -> Client:
        """Return the client of an open stream."""
        return self._streams[id(stream)].client

    def _admit(self, client: Client, num_sequences: int) -> None:
        admission = self.admission
        client.admit(num_sequences, admission.capacity, admission.retry_after_s(num_sequences))
        try:
            admission.admit(num_sequences)
        except BaseException:
            client.release(num_sequences)
            raise

    def _release(self, client: Client, num_sequences: int) -> None:
        self.admission.release(num_sequences)
        client.release(num_sequences)

    def close(self, stream: OutputStream | BeamStream) -> None:
        """Abort the unfinished requests of a stream, and release its admission."""
        admitted = self._streams.pop(id(stream), None)
        if admitted is not None:
            self._requests.own[0] = len(self._streams)
            self._release(admitted.client, admitted.num_sequences)
            # A dead engine needs no abort.
            with suppress(Exception):
                stream.close()

    def abort_all(self, error: Exception) -> None:
        """End every running request with `error`."""
        for admitted in list(self._streams.values()):
            admitted.stream.abort(error)
