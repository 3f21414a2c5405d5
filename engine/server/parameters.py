"""From the fields of a request to SamplingParams and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sempre.engine.sampling_params import MAX_STOP_STRINGS, RequestOutputKind, SamplingParams
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import APIError, BadRequest
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ResponseFormat,
    StreamOptions,
)
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.errors import ConfigError

_SAME_NAME = (
    "n",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "truncation_side",
    "logprob_token_ids",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "stream_interval",
)


def apply_server_defaults(request: GenerationRequest, config: ServerConfig) -> None:
    """Set the fields that depend on the server's settings or on other fields."""
    if config.return_tokens_as_token_ids:
        request.return_tokens_as_token_ids = True
    if config.enable_force_include_usage and request.stream:
        request.stream_options = request.stream_options or StreamOptions()
        request.stream_options.include_usage = request.stream_options.continuous_usage_stats = True
    if request.logprob_token_ids is not None:
        # they are reported as log-probabilities
        if isinstance(request, ChatCompletionRequest):
            request.logprobs = True
        elif isinstance(request, CompletionRequest) and request.logprobs is None:
            request.logprobs = 0


def completion_parameters(request: CompletionRequest, defaults: SamplingParams, config: ServerConfig) -> SamplingParams:
    """Return the parameters of /v1/completions. Raises BadRequest, or ConfigError naming the field."""
    changes = _common(request, config)
    changes["structured_outputs"] = structured_outputs(request)
    if request.max_tokens == 0:
        if not request.echo:
            raise BadRequest("max_tokens must be at least 1, got 0; 0 is for echo only.", param="max_tokens")
        if request.logprob_token_ids:
            raise BadRequest(
                "logprob_token_ids needs max_tokens of at least 1: no output tokens are generated.",
                param="logprob_token_ids",
            )
        # Only the prompt is wanted; the one token that must be sampled is not reported.
        changes["max_tokens"] = 1
    elif request.max_tokens is not None:
        changes["max_tokens"] = request.max_tokens
    if request.logprobs is not None:
        changes["logprobs"] = request.logprobs
        if request.echo:
            changes.setdefault("prompt_logprobs", request.logprobs)
    return dataclasses.replace(defaults, **changes)


def chat_parameters(request: ChatCompletionRequest, defaults: SamplingParams, config: ServerConfig) -> SamplingParams:
    """Return the parameters of /v1/chat/completions. Raises the same errors."""
    changes = _common(request, config)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.logprobs:
        changes["logprobs"] = request.top_logprobs or 0
    # the newer name comes first, as in vLLM
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    # Without a limit a response ends by itself or with the context, unless the model has its own default.
    own_default = defaults.max_tokens if defaults.max_tokens != SamplingParams().max_tokens else None
    changes["max_tokens"] = own_default if limit is None else limit
    check_template(request.chat_template, config)
    return dataclasses.replace(defaults, **changes)


def check_template(chat_template: str | None, config: ServerConfig) -> None:
    """Raise BadRequest for a request's chat template that is not allowed or invalid."""
    if chat_template is not None and not config.trust_request_chat_template:
        raise BadRequest(
            "chat_template of a request is refused unless the server runs with --trust-request-chat-template.",
            param="chat_template",
        )
    if chat_template is not None and "{" not in chat_template:
        raise BadRequest("chat_template must be a Jinja template, not the name of a file.", param="chat_template")


def check_model(name: str | None, served: list[str]) -> None:
    """Raise 404 unless the model is served; no name, or an empty one, means the first."""
    if name and name not in served:
        raise APIError(404, f"The model `{name}` does not exist.", param="model")


def _common(request: GenerationRequest, config: ServerConfig) -> dict[str, Any]:
    if isinstance(request.stop, list) and len(request.stop) > MAX_STOP_STRINGS:
        raise BadRequest(f"stop can hold at most {MAX_STOP_STRINGS} strings, got {len(request.stop)}.", param="stop")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream to be true.", param="stream_options")
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(request, name) is not None and request.stream:
            raise BadRequest(f"{name} is not available when stream is true.", param=name)
    if request.n > config.max_n:
        raise BadRequest(f"n must be at most {config.max_n} (--max-n), got {request.n}.", param="n")
    given = {name: getattr(request, name) for name in _SAME_NAME}
    changes = {name: value for name, value in given.items() if value is not None}
    if request.use_beam_search:
        del changes["n"]  # the width of the search
    elif request.length_penalty != 1.0:
        raise BadRequest("length_penalty needs use_beam_search to be true.", param="length_penalty")
    changes["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return changes


def structured_outputs(request: GenerationRequest) -> StructuredOutputsParams | None:
    """Return the form, if any. Raises BadRequest or ConfigError naming the field."""
    with blame_on(request):
        of_format = _of_format(request.response_format)
    if request.structured_outputs is None:
        return of_format
    if of_format is not None:
        raise BadRequest(
            "response_format and structured_outputs both say what form the output has; give one.",
            param="structured_outputs",
        )
    given = {name: value for name, value in request.structured_outputs.items() if value is not None}
    try:
        return StructuredOutputsParams(**given)
    except TypeError as error:
        text = str(error).replace("StructuredOutputsParams", "structured_outputs")
        raise BadRequest(text, param="structured_outputs") from None


@contextmanager
def blame_on(request: GenerationRequest) -> Iterator[None]:
    """Make errors about a grammar name the field that it came from."""
    try:
        yield
    except ConfigError as error:
        named = error.parameter or ""
        if not named.startswith("structured_outputs") or request.structured_outputs is not None:
            raise
        field = "tools" if request.response_format is None else "response_format"
        raise BadRequest(str(error).replace(named, field, 1), param=field) from None


def _of_format(given: ResponseFormat | None) -> StructuredOutputsParams | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if given.type == "structural_tag":
        members = {name: getattr(given, name) for name in ("structures", "triggers", "format")}
        named = {name: value for name, value in members.items() if value is not None}
        return StructuredOutputsParams(structural_tag={"type": given.type, **named})
    field = "response_format.json_schema"
    if given.json_schema is None:
        raise BadRequest(f"{field} must be provided: an object with a schema.", param=field)
    return StructuredOutputsParams(json=given.json_schema.schema)
