"""The server's frozen configuration: the one source for flags, environment, configuration file and docs."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta, Struct
from msgspec.structs import replace

from sempre.engine.client.successor import RestartOrder
from sempre.engine.parsing import WHOLE_FORMATS
from sempre.engine.parsing.detection import tool_format_of
from sempre.engine.setting_values import checked
from sempre.ipc.config import Count, doc
from sempre.ipc.errors import ConfigError
from sempre.ipc.model_files import read_json_object

LogFormat = Literal["text", "json"]
ToolParser = Literal[
    "auto",
    "hermes",
    "llama3_json",
    "mistral",
    "pythonic",
    "deepseek_v3",
    "deepseek_v31",
    "qwen3_coder",
    "seed_oss",
    "openai",
    "gemma4",
]
ReasoningParser = Literal["", "qwen3", "deepseek_r1", "mistral", "seed_oss", "granite", "openai_gptoss", "gemma4"]
EngineDeath = Literal["exit", "restart"]
LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]
MetricsPrefix = Literal["sempre", "vllm"]
_MOST = 2**63 - 1
_Number = Annotated[int, Meta(ge=0, le=_MOST, extra={"is_size": True})]
_Bytes = Annotated[int, Meta(ge=1024, le=_MOST, extra={"is_size": True})]
_Pause = Annotated[float, Meta(ge=0, le=1e9)]
_Timeout = Annotated[float, Meta(ge=0.1, le=1e9)]


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the server only; EngineConfig has those of the engine. Build it with `server_config(...)`."""

    host: Annotated[str, doc("address to listen on")] = "0.0.0.0"
    port: Annotated[int, Meta(ge=0, le=65535), doc("port to listen on; 0 takes a free one")] = 8000
    api_server_count: Annotated[
        Annotated[int, Meta(ge=1, le=64)], doc("processes that answer requests, in front of one engine")
    ] = 1
    headless: Annotated[bool, doc("only workers, for the engine of host 0: on hosts 1 and up of nnodes")] = False
    uds: Annotated[str | None, doc("Unix socket to listen on, instead of host and port")] = None
    served_model_name: Annotated[list[str], doc("names of the served model; the first one is reported")] = []
    lora_modules: Annotated[
        list[str], doc("adapters that clients may name as model: name=path, or JSON with name and path")
    ] = []
    allow_runtime_lora_updating: Annotated[
        bool, doc("clients may load and unload adapters, from any folder that the server can read")
    ] = False
    enable_sleep_mode: Annotated[bool, doc("clients may pause the engine, or put it to sleep, for all")] = False
    api_key: Annotated[list[str], doc("keys that clients may use; none: no key is needed")] = []
    api_key_file: Annotated[str | None, doc("file with one key per line, and settings of the key after it")] = None
    max_sequences_per_key: Annotated[_Number, doc("maximum sequences of one key at a time; 0: no such limit")] = 0
    requests_per_minute: Annotated[_Number, doc("maximum requests of one key per minute; 0: no such limit")] = 0
    tokens_per_minute: Annotated[
        _Number, doc("maximum tokens of prompts and outputs of one key per minute; 0: no such limit")
    ] = 0
    share_prefix_cache: Annotated[bool, doc("requests of different keys may share the prefix cache")] = False
    ssl_keyfile: Annotated[str | None, doc("private key, PEM; with ssl_certfile turns TLS on")] = None
    ssl_certfile: Annotated[str | None, doc("certificate chain, PEM")] = None
    ssl_ca_certs: Annotated[str | None, doc("certificate authorities of clients, PEM; clients must show one")] = None
    allowed_origins: Annotated[list[str], doc("origins of web pages that may call the server (CORS)")] = []
    allowed_hosts: Annotated[list[str], doc("host names for clients of a server without keys; * is any")] = []
    root_path: Annotated[str, doc("path under which a proxy serves this server")] = ""
    response_role: Annotated[str, doc("role of the generated messages")] = "assistant"
    enable_auto_tool_choice: Annotated[bool, doc("let the model call tools; needs tool_call_parser")] = False
    tool_call_parser: Annotated[
        ToolParser | None, doc("the format in which the model calls tools; auto: the one of its chat template")
    ] = None
    reasoning_parser: Annotated[ReasoningParser, doc("how the model marks its reasoning")] = ""
    enable_force_include_usage: Annotated[
        bool, doc("report usage in every chunk of a stream, even if not requested")
    ] = False
    enable_per_request_metrics: Annotated[bool, doc("report the times of a request in its response")] = False
    return_tokens_as_token_ids: Annotated[bool, doc("name tokens `token_id:N` in all log-probabilities")] = False
    ignore_unknown_fields: Annotated[bool, doc("ignore unknown request fields instead of refusing them")] = False
    trust_request_chat_template: Annotated[bool, doc("allow chat templates in requests")] = False
    max_num_queued_reqs: Annotated[_Number, doc("maximum waiting sequences; more get 503")] = 1024
    max_body_bytes: Annotated[_Bytes, doc("largest body of a request")] = 8 * 1024 * 1024
    max_n: Annotated[Count, doc("largest `n` of a request")] = 128
    max_prompts: Annotated[Count, doc("maximum prompts in one request")] = 2048
    shutdown_timeout: Annotated[_Pause, doc("seconds for running requests to finish after SIGTERM")] = 30.0
    on_engine_death: Annotated[
        EngineDeath,
        doc("when the engine has ended: exit with code 4, or restart it and answer 503 meanwhile"),
    ] = "exit"
    restart_order: Annotated[
        RestartOrder,
        doc(
            "how SIGUSR2 replaces the engine: start the new one first, or stop the old one first where memory is short"
        ),
    ] = "auto"
    keep_alive_timeout: Annotated[_Pause, doc("seconds that an idle connection stays open")] = 5.0
    header_timeout: Annotated[_Timeout, doc("seconds until the header of a request must be complete")] = 10.0
    body_timeout: Annotated[_Timeout, doc("seconds to receive a body, or for a stalled client to read on")] = 60.0
    max_connections: Annotated[Count, doc("maximum connections; fewer if the limit of open files is lower")] = 4096
    max_connections_per_address: Annotated[Count, doc("maximum connections from one address")] = 2048
    max_held_bytes: Annotated[_Bytes, doc("maximum bytes of all unanswered requests; more get 503")] = 128 * 1024 * 1024
    max_held_logprobs: Annotated[
        Count, doc("maximum log-probabilities of one answer held until it is complete; a stream waits for its reader")
    ] = 512 * 1024
    metrics_prefix: Annotated[MetricsPrefix, doc("prefix of the names at /metrics")] = "sempre"
    log_format: Annotated[LogFormat, doc("form of log lines")] = "text"
    enable_access_log: Annotated[bool, doc("log a line per request")] = True
    disable_uvicorn_access_log: Annotated[bool, doc("do not log a line per request")] = False
    disable_access_log_for_endpoints: Annotated[
        str, doc("paths, between commas, whose requests are not logged unless they are refused")
    ] = "/health,/live,/ready,/ping,/metrics,/load"
    log_stats_interval: Annotated[_Pause, doc("seconds between lines about throughput while busy; 0: none")] = 10.0
    uvicorn_log_level: Annotated[LogLevel, doc("log level of the HTTP library")] = "warning"
    middleware: Annotated[list[str], doc("ASGI middleware around the application: module.Class, or a function")] = []
    enable_log_requests: Annotated[bool, doc("log prompts and parameters of requests")] = False
    max_log_len: Annotated[_Number | None, doc("maximum characters and token ids logged per prompt")] = None


SECRETS = ("api_key",)
# the parsers of tool calls of architectures that have a whole format
FORMATS = {"GptOssForCausalLM": "openai"} | dict.fromkeys(
    (
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ),
    "gemma4",
)


def server_config(settings: Mapping[str, Any]) -> ServerConfig:
    """Return the checked configuration. Raises ConfigError naming the setting."""
    hints = get_type_hints(ServerConfig, include_extras=True)
    for name in settings:
        if name not in hints:
            raise ConfigError(f"{name} is not a setting of the server.", parameter=name)
    shown = dict.fromkeys(SECRETS, "a hidden value")
    config = ServerConfig(
        **{name: checked(name, value, hints[name], shown.get(name)) for name, value in settings.items()}
    )
    if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
        raise ConfigError("ssl_keyfile and ssl_certfile need each other; give both.", parameter="ssl_keyfile")
    if config.ssl_ca_certs is not None and config.ssl_certfile is None:
        raise ConfigError("ssl_ca_certs needs ssl_certfile and ssl_keyfile.", parameter="ssl_ca_certs")
    config = _with_both_of_format(config)
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        raise ConfigError("enable_auto_tool_choice needs tool_call_parser.", parameter="enable_auto_tool_choice")
    if config.middleware:
        load_middleware(config.middleware)
    if any(not key for key in config.api_key):
        raise ConfigError("api_key must not be empty.", parameter="api_key")
    return config


def with_model_defaults(config: ServerConfig, folder: Path, template: str = "") -> ServerConfig:
    """The configuration for the model in `folder` with its chat template: gpt-oss has its own format, and no other;
    Gemma 4 has its own unless the configuration names one. Raises ConfigError."""
    path = folder / "config.json"
    [architecture] = names if (names := _architectures(path)) else [""]
    tools = FORMATS.get(architecture)
    if config.tool_call_parser == "auto":
        found = None if tools is not None else tool_format_of(template)
        if tools is None and found is None:
            raise ConfigError(
                "tool_call_parser: the chat template shows no format of tool calls, so auto finds none; name one.",
                parameter="tool_call_parser",
                value="auto",
            )
        config = replace(config, tool_call_parser=found)
    if tools is None or (tools != "openai" and (config.tool_call_parser or config.reasoning_parser)):
        return config
    parsers = {"reasoning_parser": config.reasoning_parser or WHOLE_FORMATS[tools]}
    if config.tool_call_parser is None:
        parsers["tool_call_parser"] = tools
    return _with_both_of_format(replace(config, enable_auto_tool_choice=True, **parsers))


def _architectures(path: Path) -> list[str]:
    names = read_json_object(path).get("architectures") if path.exists() else None
    return names if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else []


def _with_both_of_format(config: ServerConfig) -> ServerConfig:
    """In some formats, tool calls are among the other parts of an output."""
    tools, reasoning = config.tool_call_parser, config.reasoning_parser
    if tools == "auto":
        return config
    if tools in WHOLE_FORMATS and not reasoning:
        return replace(config, reasoning_parser=WHOLE_FORMATS[tools])
    for of_calls, of_reasoning in WHOLE_FORMATS.items():
        if tools is not None and (tools == of_calls) != (reasoning == of_reasoning):
            raise ConfigError(
                f"tool_call_parser: expected {of_calls!r} beside reasoning_parser {of_reasoning!r} (one format), and no"
                f" other way, found {tools!r} beside {reasoning!r}.",
                parameter="tool_call_parser",
                value=tools,
            )
    return config


def load_middleware(names: Sequence[str]) -> list[Any]:
    """Import the dotted names: classes that take the application, or coroutine functions that take a request and
    `call_next`. Raises ConfigError naming one that is neither."""
    return [_load(name) for name in names]


def _load(name: str) -> Any:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"middleware {name!r} cannot be imported: {error}.", parameter="middleware") from error
    if not inspect.isclass(found) and not inspect.iscoroutinefunction(found):
        raise ConfigError(
            f"middleware {name!r} must be a class or a coroutine function, found {type(found).__name__}.",
            parameter="middleware",
        )
    return found
