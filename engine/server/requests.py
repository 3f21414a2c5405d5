"""Bodies of requests: OpenAI's and vLLM's fields.

Every field takes effect or is refused. Fields of either that this server lacks are in `neutral.py`, with the values
that match its behaviour; unknown fields are refused, unless the server is set to ignore them.
Null means left out (see `fields.py`), so a type includes None only if there is no default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

TokenId = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Logprobs = Annotated[int, Meta(ge=-1)]
# msgspec has no bounds beyond int64; SamplingParams checks the upper one
Seed = Annotated[int, Meta(ge=-(2**63), extra_json_schema={"maximum": 2**64 - 1})]


def _doc(text: str) -> Meta:
    return Meta(description=text)


class StreamOptions(Struct, kw_only=True):
    """What a stream reports in addition to tokens."""

    include_usage: Annotated[bool, _doc("end with a chunk that holds the usage and no choices")] = False
    continuous_usage_stats: Annotated[bool, _doc("report the usage in every chunk")] = False


class JsonSchemaFormat(Struct, kw_only=True):
    """OpenAI's wrapper of a schema, which is always enforced strictly."""

    schema: Annotated[dict[str, Any], _doc("JSON schema of the output")]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """The form of the output."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: Annotated[list[dict[str, Any]] | None, _doc("of a structural tag in vLLM's older format")] = None
    triggers: Annotated[list[str] | None, _doc("likewise")] = None
    format: Annotated[dict[str, Any] | None, _doc("of a structural tag in the newer format")] = None


class GenerationRequest(Struct, kw_only=True):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: Annotated[str | None, _doc("a name at /v1/models; default: the served model")] = None
    n: Annotated[int, Meta(ge=1, description="choices per prompt; choice i is sampled with seed + i")] = 1
    seed: Annotated[Seed | None, _doc("each choice reports the seed used")] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: NotNegative | None = None
    top_p: Annotated[Share | None, _doc("0 takes the most probable token only")] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float] | None, _doc("token id → number within ±100")] = None

    top_k: Annotated[int, Meta(ge=-1)] | None = None
    use_beam_search: Annotated[bool, _doc("return the n most probable outputs instead of samples")] = False
    length_penalty: Annotated[float, _doc("of a beam search: exponent of the length that divides a score")] = 1.0
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Count = 0
    skip_special_tokens: Annotated[bool | None, _doc("default: the model's own, or true")] = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Logprobs | None = None
    thinking_token_budget: Annotated[
        Annotated[int, Meta(ge=-1)] | None, _doc("tokens of reasoning after which </think> is forced; -1: no limit")
    ] = None
    add_special_tokens: Annotated[bool | None, _doc("whether the tokenizer adds its own (bos) to text")] = None
    priority: Annotated[
        int, Meta(ge=-(2**31), lt=2**31, description="lower is sooner, with --scheduling-policy priority")
    ] = 0
    cache_salt: (
        Annotated[str, Meta(min_length=1, description="requests with different salts share no prefix cache")] | None
    ) = None
    request_id: Annotated[str | None, _doc("suffix of the response's id, unless X-Request-Id sets it")] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1)] | None,
        _doc("prompt tokens to keep; -1: as many as the context holds"),
    ] = None
    truncation_side: Annotated[Literal["left", "right"] | None, _doc("where the prompt is cut; default: left")] = None
    logprob_token_ids: Annotated[
        list[TokenId] | None, _doc("report the log-probabilities of these ids instead of the best")
    ] = None
    prompt_logprob_token_ids: Annotated[
        list[list[Annotated[int, Meta(ge=-1, lt=2**31)]]] | None,
        _doc("one list per scored prompt token: ids whose log-probabilities to report; -1 is none"),
    ] = None
    prompt_logprob_start: Annotated[Count | None, _doc("0 scores the second prompt token first; default: 0")] = None
    stream_interval: Annotated[
        Annotated[int, Meta(ge=1)] | None, _doc("tokens per chunk, if more than the server's")
    ] = None
    return_token_ids: Annotated[bool, _doc("report token ids in addition to the text")] = False
    return_tokens_as_token_ids: Annotated[bool, _doc("name tokens `token_id:N` in log-probabilities")] = False

    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[
        dict[str, Any] | None,
        _doc("one of json, regex, choice, grammar, json_object; disable_any_whitespace, whitespace_pattern, …"),
    ] = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/completions."""

    prompt: Annotated[str | list[str | TokenId | list[TokenId]], _doc("text or token ids, or a list of either")]
    max_tokens: Annotated[Count | None, _doc("0 only with echo; default: the model's own, or 16")] = None
    echo: Annotated[bool, _doc("put the prompt before the output")] = False
    logprobs: Annotated[Logprobs | None, _doc("the k most probable tokens in addition to the sampled one")] = None


class FunctionName(Struct, kw_only=True):
    """The function of `tool_choice`."""

    name: str


class NamedToolChoice(Struct, kw_only=True):
    """Call this function."""

    type: Literal["function"]
    function: FunctionName


class FunctionDefinition(Struct, kw_only=True, rename={"returns": "return"}, omit_defaults=True):
    """A function that the model may call. Its schema is enforced strictly if a call is enforced."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, _doc("JSON schema of the arguments")] = None
    returns: Annotated[dict[str, Any] | None, _doc("JSON schema of the result, for the chat template")] = None
    strict: Annotated[bool | None, _doc("accepted, without effect")] = None


class Tool(Struct, kw_only=True):
    """A tool, passed to the chat template."""

    type: Literal["function"]
    function: FunctionDefinition


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, description="deprecated name of max_completion_tokens")] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, description="default: as many as the context holds")] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Logprobs | None, _doc("the k most probable tokens; needs logprobs")] = None
    echo: Annotated[bool, _doc("put the last message's text before the answer")] = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: Annotated[str | None, _doc("needs --trust-request-chat-template")] = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None

    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: Annotated[bool | None, _doc("false: at most one tool call")] = None
    include_reasoning: Annotated[bool | None, _doc("false: leave the reasoning out of the answer")] = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        _doc("a variable of the chat template"),
    ] = None


class LoadAdapterRequest(Struct, kw_only=True):
    """Body of /v1/load_lora_adapter."""

    lora_name: Annotated[str, Meta(min_length=1, description="what clients name as `model`")]
    lora_path: Annotated[str, Meta(min_length=1, description="folder on the server that PEFT saved")]
    load_inplace: Annotated[bool, _doc("replace an adapter of this name")] = False


class UnloadAdapterRequest(Struct, kw_only=True):
    """Body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_int_id: Annotated[Annotated[int, Meta(ge=1)] | None, _doc("must be its number, if given")] = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of /tokenize: text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: Annotated[str | None, _doc("needs --trust-request-chat-template")] = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    return_token_strs: Annotated[bool, _doc("report the vocabulary entries of the tokens")] = False


class DetokenizeRequest(Struct, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
