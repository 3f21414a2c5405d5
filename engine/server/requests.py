"""Bodies of requests: OpenAI's fields, and vLLM's beside them.

Every field of a model does what it says or is refused. `_Neutral` fields of OpenAI's are accepted only with the
values that ask for what is done anyway; fields that no model names are refused, unless the server was told otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sempre.engine.sampling_params import MAX_STOP_STRINGS

TokenId = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=-1, lt=2**64)]

_STRICT = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(BaseModel):
    """What a stream reports besides its tokens."""

    model_config = _STRICT

    include_usage: bool = Field(False, description="end with a chunk that holds the usage and no choices")
    continuous_usage_stats: bool = Field(False, description="report the usage in every chunk")


class GenerationRequest(BaseModel):
    """What /v1/completions and /v1/chat/completions have in common."""

    model_config = _STRICT

    model: str | None = Field(None, description="a name at /v1/models; left out, the model that is served")
    n: int = Field(1, ge=1, description="choices per prompt; choice i is sampled with seed + i")
    seed: Seed | None = Field(None, description="the one in use is reported in each choice")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="token id → number within ±100")
    user: str | None = Field(None, description="accepted, and without effect")

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = Field(None, ge=-1)
    add_special_tokens: bool | None = Field(None, description="whether the tokenizer adds its own (bos) to text")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="lower is sooner; needs --scheduling-policy priority")
    cache_salt: str | None = Field(None, min_length=1, description="requests with other salts share no prefix cache")
    return_token_ids: bool = Field(False, description="report token ids beside the text")
    return_tokens_as_token_ids: bool = Field(False, description="name tokens `token_id:N` in log-probabilities")

    # fields of OpenAI and vLLM that are not supported, with the values that ask for nothing
    best_of: Literal[1] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    use_beam_search: Literal[False] = False

    response_format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with a schema")
    structured_outputs: dict[str, Any] | None = Field(
        None, description="one of json, regex, choice, grammar, json_object; disable_any_whitespace, begins_after"
    )


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=0, description="0 only with echo; null is as many as the context holds")
    echo: bool = Field(False, description="put the prompt before the output")
    logprobs: int | None = Field(None, ge=0, description="the k most probable tokens beside the one sampled")
    suffix: Literal[""] | None = None


class FunctionName(BaseModel):
    """The function of `tool_choice`."""

    model_config = _STRICT

    name: str


class NamedToolChoice(BaseModel):
    """Call this function."""

    model_config = _STRICT

    type: Literal["function"]
    function: FunctionName


class FunctionDefinition(BaseModel):
    """A function that the model may call. Its schema is kept strictly where a call is enforced."""

    model_config = _STRICT

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = Field(None, description="accepted, and without effect")


class Tool(BaseModel):
    """A tool, as the chat template is told of it."""

    model_config = _STRICT

    type: Literal["function"]
    function: FunctionDefinition


class ChatCompletionRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="deprecated name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: as many as the context holds")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, description="the k most probable tokens; needs logprobs")
    echo: bool = Field(False, description="put the last message's text before the answer")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = Field(None, description="needs --trust-request-chat-template")
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    metadata: dict[str, str] | None = Field(None, description="accepted, and without effect")

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one tool call")
    include_reasoning: bool | None = Field(None, description="false: leave the reasoning out of the answer")

    # understood once something stands behind it; see `parameters.refuse_unserved`
    reasoning_effort: str | None = None


class TokenizeRequest(BaseModel):
    """Body of /tokenize: text, or messages."""

    model_config = _STRICT

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Body of /detokenize."""

    model_config = _STRICT

    model: str | None = None
    tokens: list[TokenId]
