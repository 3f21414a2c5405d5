"""The frozen configuration of the server: the one source for flags, environment, configuration file and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from sempre.engine.sizes import read_size
from sempre.ipc.errors import ConfigError

LogFormat = Literal["text", "json"]
ToolParser = Literal["hermes", "llama3_json"]
ReasoningParser = Literal["", "qwen3", "deepseek_r1"]
EngineDeath = Literal["exit", "restart"]
LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]
MetricsPrefix = Literal["sempre", "vllm"]


def _doc(text: str) -> Meta:
    return Meta(description=text)


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the server alone; those of the engine are EngineConfig's. Build it with `server_config(...)`."""

    host: Annotated[str, _doc("address to listen on")] = "0.0.0.0"
    port: Annotated[int, _doc("port to listen on; 0 takes a free one")] = 8000
    uds: Annotated[str | None, _doc("Unix socket to listen on, in place of host and port")] = None
    served_model_name: Annotated[list[str], _doc("names the model is served under; the first one is reported")] = []
    api_key: Annotated[list[str], _doc("keys that clients may use; none lets everybody in")] = []
    api_key_file: Annotated[str | None, _doc("file with one key per line")] = None
    ssl_keyfile: Annotated[str | None, _doc("private key, PEM; with ssl_certfile turns TLS on")] = None
    ssl_certfile: Annotated[str | None, _doc("certificate chain, PEM")] = None
    ssl_ca_certs: Annotated[str | None, _doc("certificate authorities of clients, PEM; clients must show one")] = None
    allowed_origins: Annotated[list[str], _doc("origins of web pages that may call (CORS)")] = []
    allowed_hosts: Annotated[list[str], _doc("names by which clients call a server without keys; * is any")] = []
    root_path: Annotated[str, _doc("path under which a proxy serves this server")] = ""
    response_role: Annotated[str, _doc("role of the messages that are answered")] = "assistant"
    enable_auto_tool_choice: Annotated[bool, _doc("let the model call tools; needs tool_call_parser")] = False
    tool_call_parser: Annotated[ToolParser | None, _doc("the format in which the model calls tools")] = None
    reasoning_parser: Annotated[ReasoningParser, _doc("how the model marks its reasoning")] = ""
    enable_force_include_usage: Annotated[bool, _doc("end every stream with its usage, asked for or not")] = False
    return_tokens_as_token_ids: Annotated[bool, _doc("name tokens `token_id:N` in all log-probabilities")] = False
    ignore_unknown_fields: Annotated[bool, _doc("leave unknown request fields aside instead of refusing them")] = False
    trust_request_chat_template: Annotated[bool, _doc("let requests bring a chat template")] = False
    max_num_queued_reqs: Annotated[int, _doc("most sequences that wait while max_num_seqs run; more get 503")] = 1024
    max_body_bytes: Annotated[int, _doc("largest body of a request")] = 8 * 1024 * 1024
    max_n: Annotated[int, _doc("largest `n` of a request")] = 128
    max_prompts: Annotated[int, _doc("most prompts in one request")] = 1024
    shutdown_timeout: Annotated[float, _doc("seconds that running requests have left after SIGTERM")] = 30.0
    on_engine_death: Annotated[
        EngineDeath,
        _doc("when the engine has ended: exit with code 4, or restart it and answer 503 meanwhile"),
    ] = "exit"
    keep_alive_timeout: Annotated[float, _doc("seconds that an idle connection stays open")] = 5.0
    header_timeout: Annotated[float, _doc("seconds in which the header of a request must come")] = 10.0
    body_timeout: Annotated[float, _doc("seconds in which a body must come, and a stalled answer be read")] = 60.0
    max_connections: Annotated[int, _doc("most connections; as many as the limit of open files allows, if less")] = 4096
    max_connections_per_address: Annotated[int, _doc("most connections from one address")] = 2048
    max_held_bytes: Annotated[int, _doc("most bytes of unanswered requests in all; more get 503")] = 128 * 1024 * 1024
    metrics_prefix: Annotated[MetricsPrefix, _doc("prefix of the names at /metrics")] = "sempre"
    log_format: Annotated[LogFormat, _doc("form of log lines")] = "text"
    enable_access_log: Annotated[bool, _doc("log a line per request")] = True
    disable_uvicorn_access_log: Annotated[bool, _doc("log no line per request")] = False
    uvicorn_log_level: Annotated[LogLevel, _doc("what of the HTTP library's own log is shown")] = "warning"
    middleware: Annotated[list[str], _doc("ASGI middleware around the application: module.Class, or a function")] = []
    enable_log_requests: Annotated[bool, _doc("log prompts and parameters of requests")] = False
    max_log_len: Annotated[int | None, _doc("most characters, and token ids, of a prompt that are logged")] = None


_LEAST = {
    "port": 0,
    "max_num_queued_reqs": 0,
    "max_body_bytes": 1024,
    "max_n": 1,
    "max_prompts": 1,
    "shutdown_timeout": 0.0,
    "keep_alive_timeout": 0.0,
    "header_timeout": 0.1,
    "body_timeout": 0.1,
    "max_connections": 1,
    "max_connections_per_address": 1,
    "max_held_bytes": 1024,
    "max_log_len": 0,
}
SECRETS = ("api_key",)
_SIZES = ("max_body_bytes", "max_held_bytes", "max_num_queued_reqs", "max_log_len")
"""Settings that may be a text such as 8MiB."""


def _size(name: str, value: Any) -> Any:
    if name not in _SIZES or not isinstance(value, str):
        return value
    try:
        return read_size(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}.", parameter=name, value=value) from None


def server_config(settings: Mapping[str, Any]) -> ServerConfig:
    """Return the checked configuration. Raises ConfigError naming the setting."""
    given = {name: _size(name, value) for name, value in settings.items()}
    try:
        config = msgspec.convert(given, ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a setting of the server is refused: {error}") from None
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not least <= value < math.inf:
            raise ConfigError(f"{name} must be at least {least}, got {value}.", parameter=name, value=value)
    if config.port > 65535:
        raise ConfigError(f"port must be at most 65535, got {config.port}.", parameter="port", value=config.port)
    if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
        raise ConfigError("ssl_keyfile and ssl_certfile need each other; give both.", parameter="ssl_keyfile")
    if config.ssl_ca_certs is not None and config.ssl_certfile is None:
        raise ConfigError("ssl_ca_certs needs ssl_certfile and ssl_keyfile.", parameter="ssl_ca_certs")
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        raise ConfigError("enable_auto_tool_choice needs tool_call_parser.", parameter="enable_auto_tool_choice")
    if config.middleware:
        # here: what it needs is imported when a server starts, and not to print help
        from sempre.engine.server.user_middleware import load_middleware

        load_middleware(config.middleware)
    if any(not key for key in config.api_key):
        raise ConfigError("api_key must not be empty.", parameter="api_key")
    return config
