"""What `LLM` and `AsyncLLM` share: from prompts to requests, and from deltas to outputs."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sempre.engine.adapters import Adapter, Adapters
from sempre.engine.arguments import Arguments
from sempre.engine.fingerprint import (
    fingerprint_bits,
    fingerprint_digest,
    fingerprint_environment,
    fingerprint_with_adapter,
)
from sempre.engine.frontend.limits import RequestLimits
from sempre.engine.frontend.new_weights import NewWeights
from sempre.engine.frontend.output_processor import OutputProcessor, RequestState
from sempre.engine.frontend.pooling import pair_messages
from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.frontend.request_builder import RequestBuilder
from sempre.engine.metrics import Metric, read_metrics
from sempre.engine.near_names import near_name
from sempre.engine.proof.recorder import Recorder
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.seed_counts import Numbering
from sempre.engine.structured_outputs import structured_outputs_defaults
from sempre.engine.text.absent_tokenizer import AbsentTokenizer
from sempre.engine.text.messages import ContentFormat
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.codec import UNSEQUENCED, FrameEncoder
from sempre.ipc.config import with_weights
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ConfigError, ModelError, RecordError, RequestCrashed, RequestError, SempreError
from sempre.ipc.log_lines import plain
from sempre.ipc.messages import (
    CallWorkers,
    CallWorkersReply,
    EngineReady,
    MetricsReply,
    PoolingModel,
    UpdateWeightsReply,
)
from sempre.ipc.model_files import read_json_object, read_text

logger = logging.getLogger(__name__)
# generation_config.json's name → ours
_GENERATION_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
    "skip_special_tokens": "skip_special_tokens",
}
_MOST_NAMES = 16
"""maximum variables checked per conversation"""
_MOST_WARNINGS = 32
_MOST_SHOWN = 60
# used by the engine itself if a template asks for today's date
_READ_OTHERWISE = {"date_string": "strftime_now"}


class Frontend:
    """The text side of one engine: tokenizer, templates, default parameters and, after `connect`, requests."""

    processor: OutputProcessor
    """The unfinished requests; set by `connect`."""
    builder: RequestBuilder
    """Checks and numbers requests; set by `connect`."""
    fingerprint: str = ""
    """Digest of `bits`; set by `connect`."""
    pooling: PoolingModel | None = None
    """What the model computes instead of generating; set by `connect`."""

    numbering: Numbering | None = None
    """What processes that share the engine have in common; set before `connect`."""

    def __init__(self, arguments: Arguments) -> None:
        """Load the tokenizer. Raises ModelError if it or generation_config.json is unusable, ConfigError for a
        missing chat template or an unusable key of receipts, RecordError for their folder."""
        self.config, self._options = arguments
        folder = self._options.tokenizer
        self.tokenizer: Tokenizer = (
            AbsentTokenizer()
            if self._options.skip_tokenizer_init
            else Tokenizer.from_folder(self.config.model_path if folder is None else folder)
        )
        self._structured_outputs = structured_outputs_defaults(self._options.structured_outputs_config)
        self.default_sampling_params = self._default_sampling_params()
        self.recorder = Recorder(arguments, self._structured_outputs)
        if self.recorder.records_all:
            self.recorder.prepare()
        given = self._options.chat_template
        self._chat_template = None if given is None else _template_text(given)
        self.bits: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self._weights: NewWeights | None = None
        self.adapters = Adapters(are_served=self.config.enable_lora)
        self._unread = UnreadVariables()

    def connect(self, ready: EngineReady) -> None:
        """Set the limits of the engine, which is now ready."""
        # Each source may have end tokens that the other lacks.
        eos_token_ids = list(dict.fromkeys([*self.tokenizer.eos_token_ids, *ready.eos_token_ids]))
        limits = RequestLimits(
            engine_seed=self.config.seed,
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            max_kv_tokens=ready.num_blocks * ready.block_size,
            max_logprobs=self.config.max_logprobs,
            eos_token_ids=eos_token_ids,
            structured_outputs=self._structured_outputs,
            pooling=ready.pooling,
            logprobs_mode=self.config.logprobs_mode,
        )
        self.pooling = ready.pooling
        self._take_fingerprint(ready.fingerprint)
        self.processor = OutputProcessor(
            self.tokenizer, self.fingerprint_with, self._options.stream_interval, self.recorder
        )
        self.builder = RequestBuilder(
            self.tokenizer,
            limits,
            self.processor.is_in_use,
            records_all=self.recorder.records_all,
            numbering=self.numbering,
        )

    def _take_fingerprint(self, parts: Mapping[str, str]) -> None:
        self.bits = fingerprint_bits(parts)
        self.environment = fingerprint_environment(parts)
        self.fingerprint = fingerprint_digest(self.bits)
        self.recorder.connect(self.bits, self.environment, Path(self.config.weights_folder))

    def use_weights(self, weights: NewWeights, parts: Mapping[str, str]) -> None:
        """The workers have new weights, and this fingerprint; all unfinished requests begin with them."""
        former, self._weights = self._weights, weights
        self.config = with_weights(self.config, weights.path)
        self._take_fingerprint(parts)
        self.processor.rename()
        if former is not None:
            former.remove()

    def fingerprint_with(self, adapter: Adapter | None) -> str:
        """Return the fingerprint of outputs with this adapter; None: the model itself."""
        return self.fingerprint if adapter is None else fingerprint_with_adapter(self.bits, adapter.spec.digest)

    @property
    def served_model_name(self) -> str:
        """The model's name in metrics."""
        return self._options.served_model_name or self.config.model

    @property
    def tokenizer_name(self) -> str:
        """The folder or name of the tokenizer."""
        return self._options.tokenizer or self.config.model

    @property
    def chat_template(self) -> str | None:
        """The template that `render_chat` uses for a conversation without tools, or None."""
        return self.tokenizer.chat_template if self._chat_template is None else self._chat_template

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **keywords: Any) -> TokensPrompt:
        """Return the conversation as a prompt; takes the keywords of `chat_arguments`.

        Raises RequestError for bad messages, and the errors of `chat_arguments`.
        """
        from sempre.engine.text.chat_template import render_chat

        text = render_chat(**self.chat_arguments(messages, **keywords))
        # The template writes the special tokens itself.
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def pair_arguments(self, query: str, document: str) -> dict[str, Any] | None:
        """Return the arguments of `render_chat` for a pair to be scored; None if the template has no such roles."""
        messages = pair_messages(self.chat_template, query, document)
        return None if messages is None else self.chat_arguments(messages)

    def pair_prompt(self, query: str, document: str) -> TokensPrompt:
        """Return a pair as the prompt that is scored: by the chat template, or both texts as the tokenizer pairs
        them."""
        arguments = self.pair_arguments(query, document)
        if arguments is None:
            return {"prompt_token_ids": self.tokenizer.encode_pair(query, document)}
        from sempre.engine.text.chat_template import render_chat

        text = render_chat(**arguments)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def chat_arguments(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_content_format: ContentFormat | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of `text.chat_template.render_chat`; the default format is the engine's.

        Raises ConfigError without a template, RequestError for a variable of a reserved name.
        """
        from sempre.engine.text.chat_template import checked_variables

        template = self._chat_template if chat_template is None else _template_text(chat_template)
        if template is None:
            template = self.tokenizer.own_template(with_tools=bool(tools))
        self._unread.warn(template, [*(["tools"] if tools else []), *(chat_template_kwargs or ())])
        return {
            "messages": messages,
            "template": template,
            "bos_token": self.tokenizer.bos_token,
            "eos_token": self.tokenizer.eos_token,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "content_format": chat_template_content_format or self._options.chat_template_content_format,
            **(self._options.default_chat_template_kwargs or {}),
            **checked_variables(chat_template_kwargs),
        }

    def _default_sampling_params(self) -> SamplingParams:
        path = Path(self.config.model_path) / "generation_config.json"
        found: dict[str, Any] = {}
        if self._options.generation_config == "auto" and path.exists():
            found |= read_json_object(path)
        found |= _generation_overrides(self._options.override_generation_config or {})
        given = {ours: found[theirs] for theirs, ours in _GENERATION_FIELDS.items() if found.get(theirs) is not None}
        try:
            params = SamplingParams(**given)
        except ConfigError as error:
            raise ModelError(f"{path}: {error} Use generation_config='vllm' to ignore this file.") from error
        if given:
            logger.info("default sampling parameters of the model (generation_config.json): %s", given)
        return params


def _generation_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Check that each is a default with an effect. Raises ConfigError."""
    for name, value in overrides.items():
        if name not in _GENERATION_FIELDS:
            near = near_name(name, _GENERATION_FIELDS)
            raise ConfigError(
                f"override_generation_config: {name!r} is not a default sampling parameter; known are "
                f"{', '.join(_GENERATION_FIELDS)}.{f' Did you mean {near!r}?' if near else ''}",
                parameter=f"override_generation_config.{name}",
                value=value,
            )
        try:
            SamplingParams(**{_GENERATION_FIELDS[name]: value})
        except ConfigError as error:
            raise ConfigError(
                f"override_generation_config.{name}: {error}",
                parameter=f"override_generation_config.{name}",
                value=value,
            ) from error
    return dict(overrides)


def limits_of(ready: EngineReady) -> EngineReady:
    """The part that requests depend on, without what differs from start to start."""
    return replace(ready, phase_seconds={}, worker_pids=[], draft_worker_pids=[])


def engine_metrics(reply: MetricsReply, frontend: Frontend) -> list[Metric]:
    """Return the coordinator's metrics and those of this process."""
    own = {"unseeded_digests_dropped": float(frontend.builder.num_dropped_digests)}
    return read_metrics({**reply.values, **own, **frontend.processor.sizes.report()}, frontend.served_model_name)


def call_results(reply: CallWorkersReply, method: str) -> list[object]:
    """Return one result per worker. Raises the worker's error: its own class if it is ours, else RequestError."""
    if reply.error is None:
        return list(reply.results)
    error: SempreError | None = restore(reply.error)
    if error is None:
        rank = "" if reply.error.rank is None else f" on rank {reply.error.rank}"
        error = RequestError(f"{method} failed{rank}: {reply.error.type}: {reply.error.message}", parameter="method")
    error.add_note(reply.error.traceback)
    raise error


def updated_fingerprint(reply: UpdateWeightsReply) -> dict[str, str]:
    """Return the fingerprint with the new weights. Raises the error of workers that refused them."""
    if reply.error is None:
        return reply.fingerprint
    raise restore(reply.error) or RequestError(f"update_weights: {reply.error.type}: {reply.error.message}")


def raise_failure(state: RequestState) -> None:
    """Raise RequestError if a sequence of the request failed while it ran; RequestCrashed if its worker died, too;
    RecordError if its receipt could not be written."""
    if state.error is not None:
        name = state.request_id
        text = f"request {name} failed: {state.error.type}: {state.error.message}"
        original = restore(state.error)
        if isinstance(original, RecordError):
            raise original
        if isinstance(original, RequestCrashed):
            raise RequestCrashed(text, request_id=name, num_crashes=original.num_crashes)
        raise RequestError(text, request_id=name)


def worker_call(
    call_id: int, method: object, args: Sequence[object], kwargs: Mapping[str, object] | None
) -> CallWorkers:
    """Return the call of a worker method. Raises RequestError for arguments that cannot cross a process."""
    call = CallWorkers(call_id=call_id, method=_checked_method(method), args=list(args), kwargs=dict(kwargs or {}))
    try:
        FrameEncoder(sys.maxsize).encode(call, UNSEQUENCED)
    except TypeError as error:
        raise RequestError(
            f"args and kwargs of {method} must be numbers, strings, bytes, None, lists or mappings: {error}.",
            parameter="args",
        ) from None
    return call


def _checked_method(method: object) -> str:
    """Return the name of a worker method. Raises RequestError for a function, which cannot cross a process."""
    if not isinstance(method, str):
        raise RequestError(
            f"method must be the name of a worker method, got {type(method).__name__}: functions are never sent to "
            "another process.",
            parameter="method",
            value=method,
        )
    if method.startswith("_"):
        raise RequestError(
            f"method must be a public method of a worker, got {method!r}.", parameter="method", value=method
        )
    return method


def _template_text(template: str) -> str:
    """Return a template given as text or as a file path; only text contains braces."""
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template {template!r} is neither a file nor a Jinja template.",
            parameter="chat_template",
            value=template,
        )
    return read_text(path)


class UnreadVariables:
    """Warns once per variable without effect; the number of warnings is limited, since clients choose the names."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def warn(self, template: str, names: Iterable[object]) -> None:
        """Warn about the `names` that do not occur in the template."""
        for name in map(str, islice(names, _MOST_NAMES)):
            if (template, name) in self._warned or len(self._warned) >= _MOST_WARNINGS or _is_read(template, name):
                continue
            self._warned.add((template, name))
            shown = plain(name[:_MOST_SHOWN])
            if name == "tools":
                logger.warning("the chat template does not read tools: the model does not see the tools of requests")
            else:
                logger.warning("the chat template does not read the variable %s; it has no effect", shown)
            if len(self._warned) == _MOST_WARNINGS:
                logger.warning("no more warnings about variables that chat templates do not read")


def _is_read(template: str, name: str) -> bool:
    words = [name, *([_READ_OTHERWISE[name]] if name in _READ_OTHERWISE else [])]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", template) for word in words)
