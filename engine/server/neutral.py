"""Fields of OpenAI's and vLLM's interface that this server lacks, with the values that match its behaviour.

A field is refused only if it would change the response. Only this table says when it would not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import Struct

from sempre.engine.server.agents import messages_requests as of_messages
from sempre.engine.server.agents import responses_requests as of_responses
from sempre.engine.server.pooling_requests import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    FunctionDefinition,
    LoadAdapterRequest,
    StreamOptions,
    TokenizeRequest,
    Tool,
    UnloadAdapterRequest,
)


class Neutral(NamedTuple):
    """A field that is accepted and has no effect."""

    kind: Any
    """the type of its value"""
    values: tuple[Any, ...] | None = None
    """the accepted values; None: all of the type"""
    instead: str = ""
    """the replacement here, if no value is accepted"""


_NOTHING: tuple[Any, ...] = ()
_OBJECT = dict[str, Any]

_GENERATION = {
    "user": Neutral(str),
    "metadata": Neutral(_OBJECT),
    "store": Neutral(bool),
    "service_tier": Neutral(str),
    "safety_identifier": Neutral(str),
    "prompt_cache_key": Neutral(str),
    "prompt_cache_retention": Neutral(str),
    "best_of": Neutral(int, (1,)),
    "early_stopping": Neutral(bool, (False,)),
    "spaces_between_special_tokens": Neutral(bool, (True,)),
    "logits_processors": Neutral(list[Any], ([],)),
    "kv_transfer_params": Neutral(_OBJECT, ({},)),
    "ec_transfer_params": Neutral(_OBJECT, ({},)),
    "vllm_xargs": Neutral(_OBJECT, ({},)),
    "mm_processor_kwargs": Neutral(_OBJECT, ({},)),
    "repetition_detection": Neutral(_OBJECT, _NOTHING),
    "watermarking": Neutral(bool, (False,)),
    "session_id": Neutral(str),
    "return_weight_versions": Neutral(bool, (False,)),
    # which part of a report to leave out, and there is none
    "routed_experts_prompt_start": Neutral(int),
    # of vLLM's endpoints that only render prompts
    "return_token_offsets": Neutral(bool, (False,)),
    "mm_payload": Neutral(str, _NOTHING),
    "return_mm_kwargs": Neutral(bool, (False,)),
    "guided_json": Neutral(_OBJECT, _NOTHING, 'structured_outputs: {"json": …}'),
    "guided_regex": Neutral(str, _NOTHING, 'structured_outputs: {"regex": …}'),
    "guided_choice": Neutral(list[str], _NOTHING, 'structured_outputs: {"choice": …}'),
    "guided_grammar": Neutral(str, _NOTHING, 'structured_outputs: {"grammar": …}'),
}

_POOLING = {
    "user": Neutral(str),
    "padding": Neutral(str, ("do_not_pad",)),
    "mm_processor_kwargs": Neutral(_OBJECT, ({},)),
    "normalize": Neutral(bool, _NOTHING, "use_activation"),
}
# of pairs: where their texts are cut, and what a template knows beside them
_PAIRS = {
    **_POOLING,
    "max_tokens_per_query": Neutral(int, (0,)),
    "max_tokens_per_doc": Neutral(int, (0,)),
    "instruction": Neutral(str, _NOTHING),
    "chat_template_kwargs": Neutral(_OBJECT, ({},)),
}
# of an encoding in base64
_EMBEDDING = {
    **_POOLING,
    "embed_dtype": Neutral(str, ("float32",)),
    "endianness": Neutral(str, ("native", "little")),
    "messages": Neutral(list[Any], _NOTHING, "input"),
}

_CACHED = {"cache_control": Neutral(_OBJECT)}
# that nothing but the model's own answer calls a tool
_CALLER = {"caller": Neutral(_OBJECT, ({"type": "direct"},))}
_STORED = "the whole conversation as input: this server stores no responses"
_MESSAGES = {
    "metadata": Neutral(_OBJECT),
    "cache_control": Neutral(_OBJECT),
    "service_tier": Neutral(str),
    "inference_geo": Neutral(str),
    "speed": Neutral(str, ("standard",)),
    "container": Neutral(Any, _NOTHING),
    "mcp_servers": Neutral(list[Any], ([],)),
    # what Claude Code sends, and means that nothing is edited
    "context_management": Neutral(
        _OBJECT, ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})
    ),
}
_RESPONSES = {
    "user": Neutral(str),
    "store": Neutral(bool),
    "service_tier": Neutral(str),
    "safety_identifier": Neutral(str),
    "prompt_cache_key": Neutral(str),
    "prompt_cache_retention": Neutral(str),
    "prompt_cache_options": Neutral(_OBJECT),
    "stream_options": Neutral(_OBJECT, ({}, {"include_obfuscation": True}, {"include_obfuscation": False})),
    "background": Neutral(bool, (False,)),
    "top_logprobs": Neutral(int, (0,)),
    # of tools that the server runs, and there are none
    "max_tool_calls": Neutral(int),
    "previous_response_id": Neutral(str, _NOTHING, _STORED),
    "conversation": Neutral(Any, _NOTHING, _STORED),
    "prompt": Neutral(_OBJECT, _NOTHING, "instructions and input"),
    "context_management": Neutral(list[Any], ([],)),
}
_ITEM = {"id": Neutral(str), "status": Neutral(str)}
_OF_AGENTS: dict[type[Struct], dict[str, Neutral]] = {
    of_messages.MessagesRequest: _MESSAGES,
    of_messages.CountTokensRequest: _MESSAGES,
    of_messages.InputMessage: {},
    of_messages.TextBlock: {**_CACHED, "citations": Neutral(list[Any], ([],))},
    of_messages.ThinkingBlock: {"signature": Neutral(str)},
    of_messages.ToolUseBlock: {**_CACHED, **_CALLER},
    of_messages.ToolResultBlock: _CACHED,
    of_messages.ClientTool: {
        **_CACHED,
        "defer_loading": Neutral(bool, (False,)),
        # when the input is streamed
        "eager_input_streaming": Neutral(bool),
        "allowed_callers": Neutral(list[str], (["direct"],)),
        "input_examples": Neutral(list[Any], ([],)),
    },
    of_responses.ResponsesRequest: _RESPONSES,
    of_responses.InputText: {"prompt_cache_breakpoint": Neutral(_OBJECT)},
    of_responses.OutputText: {"annotations": Neutral(list[Any]), "logprobs": Neutral(list[Any])},
    of_responses.InputItemMessage: {**_ITEM, "phase": Neutral(str)},
    of_responses.ReasoningItem: _ITEM,
    of_responses.FunctionCallItem: {**_ITEM, **_CALLER},
    of_responses.FunctionCallOutputItem: {**_ITEM, **_CALLER, "name": Neutral(str)},
    of_responses.FunctionTool: {
        "defer_loading": Neutral(bool, (False,)),
        "allowed_callers": Neutral(list[str], (["direct"],)),
        "output_schema": Neutral(_OBJECT, _NOTHING),
    },
    of_responses.TextConfig: {"verbosity": Neutral(str, ("medium",))},
    of_responses.ReasoningConfig: {
        "generate_summary": Neutral(str),
        "context": Neutral(str, ("auto", "all_turns")),
        "mode": Neutral(str, ("standard",)),
    },
}

NEUTRAL: dict[type[Struct], dict[str, Neutral]] = {
    **_OF_AGENTS,
    CompletionRequest: {
        **_GENERATION,
        "suffix": Neutral(str, ("",)),
        "prompt_embeds": Neutral(str, _NOTHING),
    },
    ChatCompletionRequest: {
        **_GENERATION,
        "modalities": Neutral(list[str], (["text"],)),
        "audio": Neutral(_OBJECT, _NOTHING),
        # a predicted answer, which affects only speed
        "prediction": Neutral(_OBJECT),
        "verbosity": Neutral(str, ("medium",)),
        "prompt_cache_options": Neutral(_OBJECT),
        "return_prompt_text": Neutral(bool, (False,)),
        "web_search_options": Neutral(_OBJECT, _NOTHING),
        "functions": Neutral(list[Any], ([],)),
        "function_call": Neutral(str, ("none", "auto")),
        "media_io_kwargs": Neutral(_OBJECT, ({},)),
    },
    TokenizeRequest: {
        "mm_processor_kwargs": Neutral(_OBJECT, ({},)),
        "media_io_kwargs": Neutral(_OBJECT, ({},)),
    },
    DetokenizeRequest: {},
    LoadAdapterRequest: {},
    UnloadAdapterRequest: {},
    EmbeddingRequest: _EMBEDDING,
    PoolingRequest: _EMBEDDING,
    ClassificationRequest: {**_POOLING, "messages": Neutral(list[Any], _NOTHING, "input")},
    ScoreRequest: _PAIRS,
    RerankRequest: {**_PAIRS, "return_documents": Neutral(bool, (True,))},
    # pads stream events to hide their size on the network
    StreamOptions: {"include_obfuscation": Neutral(bool)},
    Tool: {"cache_control": Neutral(_OBJECT), "defer_loading": Neutral(bool, (False,))},
    FunctionDefinition: {"cache_control": Neutral(_OBJECT), "defer_loading": Neutral(bool, (False,))},
}
