"""`sempre serve`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from sempre.engine.arguments import SHORT_SPECULATION, FrontendConfig, field_types, parse_arguments
from sempre.engine.cli.arguments import (
    add_config_flags,
    add_engine_flags,
    add_vllm_flags,
    config_values,
    engine_keywords,
    given_values,
)
from sempre.engine.cli.config_file import named_places, read_config
from sempre.engine.cli.parser import UsageError
from sempre.engine.executor.threads import threads_beside_a_server
from sempre.engine.near_names import near_name
from sempre.engine.nodes import NODE_SETTINGS, nodes_of_environment
from sempre.engine.server.config import SECRETS, ServerConfig, server_config
from sempre.engine.setting_values import options, read_size
from sempre.engine.vllm_settings import VLLM_KEYWORDS, VLLM_SERVER_SETTINGS, check_vllm_settings
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "SEMPRE_"
_SERVICE_VARIABLE = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")
_SERVER_SETTINGS = field_types(ServerConfig)
_ENGINE_SETTINGS: tuple[str, ...] = (
    *field_types(EngineConfig),
    *field_types(FrontendConfig),
    *SHORT_SPECULATION,
    *(name for name in VLLM_KEYWORDS if name not in _SERVER_SETTINGS),
)

_KNOWN = frozenset({"model", *_SERVER_SETTINGS, *_ENGINE_SETTINGS, *VLLM_SERVER_SETTINGS})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="name (tiny, …), folder, or hub id")
    parser.add_argument("--model", metavar="MODEL", help="the same")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, with the names of the flags")
    parser.add_argument("--print-config", action="store_true", help="print the settings in use as YAML, then exit")
    add_config_flags(parser, "server", ServerConfig)
    add_engine_flags(parser, without=_SERVER_SETTINGS)
    add_vllm_flags(parser, VLLM_SERVER_SETTINGS)


def run(namespace: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    settings, places = _settings(namespace)
    settings |= _nodes_of_launcher(settings)
    with named_places(places):
        check_vllm_settings(settings)
        server = server_config({name: value for name, value in settings.items() if name in _SERVER_SETTINGS})
        engine = {name: value for name, value in settings.items() if name in _ENGINE_SETTINGS}
        model = settings.get("model")
        if model is None:
            raise UsageError("no model given; the model `tiny` is always available: sempre serve tiny")
        # Nothing is started for settings that cannot work.
        config = parse_arguments(model, engine).engine
    if not engine.get("num_threads"):
        engine["num_threads"] = threads_beside_a_server(config.ranks_per_node)
    if namespace.print_config:
        _print_config(model, engine, server)
        return 0
    if server.headless:
        return _run_headless(config, server)

    from sempre.engine.async_llm import AsyncLLM
    from sempre.engine.server.api_keys import api_keys
    from sempre.engine.server.logs import set_up_logging
    from sempre.engine.server.run import serve
    from sempre.engine.server.supervisor import Launch, supervise

    keys = api_keys(server)
    set_up_logging(server.log_format, debug=namespace.debug, uvicorn_level=server.uvicorn_log_level)
    if not keys and os.environ.get("VLLM_API_KEY"):
        logger.warning("VLLM_API_KEY is ignored, so requests need no key; set %sAPI_KEY", ENVIRONMENT_PREFIX)
    if server.api_server_count == 1:
        serve(AsyncLLM(model, **engine), server)
    else:
        supervise(Launch(model, engine, namespace.debug), server)
    return 0


class _Told(Exception):
    """SIGTERM or SIGINT."""


def _run_headless(config: EngineConfig, server: ServerConfig) -> int:
    """Have workers of another host's engine here, until that ends or a signal comes."""
    if config.node_rank == 0:
        raise ConfigError(
            "headless: host 0 has the engine and its server. Give the other hosts node_rank=1 and up.",
            parameter="headless",
            value=True,
        )
    from sempre.engine.executor.node_agent import NodeAgent
    from sempre.engine.server.logs import set_up_logging

    def end(number: int, frame: object) -> None:
        raise _Told

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    set_up_logging(server.log_format, debug=False, uvicorn_level=server.uvicorn_log_level)
    try:
        NodeAgent(config).run()
    except _Told:
        logger.info("told to end")
    return 0


def _nodes_of_launcher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what torchrun or a LeaderWorkerSet says of hosts, unless the settings do."""
    if any(name in settings for name in NODE_SETTINGS):
        return {}
    found = nodes_of_environment(os.environ)
    if found.settings.get("nnodes", 1) == 1:
        return {}
    own = {name: value for name, value in found.settings.items() if name not in settings}
    shown = ", ".join(f"{name}={value}" for name, value in own.items())
    logger.warning("%s, as %s says", shown, found.source)
    return {"headless": True, **own} if found.settings["node_rank"] else own


class Settings(NamedTuple):
    """The given settings, and the places of those that a file has set."""

    values: dict[str, Any]
    places: dict[str, str]


def _settings(namespace: argparse.Namespace) -> Settings:
    """Return the given settings: flags override the environment, which overrides the file."""
    path = namespace.config or os.environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    settings, places = ({}, {}) if path is None else read_config(path, _KNOWN)
    for name, value in settings.items():
        if isinstance(value, str) and name in _SERVER_SETTINGS and _is_list(name):
            settings[name] = [value]
    others = _from_environment() | config_values(namespace, ServerConfig) | engine_keywords(namespace)
    others |= given_values(namespace, VLLM_SERVER_SETTINGS)
    settings |= others
    given = [model for model in (namespace.model_argument, namespace.model) if model is not None]
    if len(set(given)) > 1:
        raise UsageError(f"two models are given: {' and '.join(given)}")
    if given:
        settings["model"] = given[0]
    return Settings(settings, {name: place for name, place in places.items() if name not in others})


def _from_environment() -> dict[str, Any]:
    """Return the server's settings from the environment (SEMPRE_PORT, …), and the model.

    Engine settings are not read from there: what outputs depend on should be set visibly.
    """
    settings: dict[str, Any] = {}
    links = service_variables(os.environ)
    if links:
        logger.warning("ignored as settings, since Kubernetes sets them for a service: %s", ", ".join(links))
    for name in ("model", *_SERVER_SETTINGS):
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = os.environ.get(variable)
        if text is not None and variable not in links:
            settings[name] = text if name == "model" else _converted(name, text)
    return settings


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable with our prefix that nothing reads."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in ("model", "config", *_SERVER_SETTINGS)}
    known |= {"SEMPRE_CACHE", "SEMPRE_DEBUG", "SEMPRE_MULTIPROCESSING", *service_variables(environment)}
    sentences = []
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in known:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        near = near_name(variable, known)
        hint = f" Did you mean {near}?" if near else ""
        if name in _ENGINE_SETTINGS:
            hint = f" Settings of the engine are not read from the environment: use --{name.replace('_', '-')}."
        sentences.append(f"the variable {variable} is not read.{hint}")
    return sentences


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes sets in every container for a service whose name begins with ours.

    For a service `sempre`: SEMPRE_PORT=tcp://10.0.0.1:8000, SEMPRE_SERVICE_HOST, SEMPRE_PORT_8000_TCP_ADDR, …
    """
    return sorted(
        name
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
        and (_SERVICE_VARIABLE.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value)))
    )


def _is_list(name: str) -> bool:
    return msgspec.json.schema(_SERVER_SETTINGS[name]).get("type") == "array"


def _converted(name: str, text: str) -> object:
    """Return a variable's text as its setting's type; lists are separated by commas."""
    kind = _SERVER_SETTINGS[name]
    try:
        if _is_list(name):
            return [part.strip() for part in text.split(",")]
        if int in options(kind) and text.strip().lower() not in ("none", "null", ""):
            return read_size(text)
        return msgspec.convert(text, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        shown = "its value" if name in SECRETS else repr(text)
        raise ConfigError(f"{ENVIRONMENT_PREFIX}{name.upper()}: {shown} is refused: {error}", parameter=name) from None


def _print_config(model: str, engine: dict[str, Any], server: ServerConfig) -> None:
    """Print a file for `--config`; keys are left out."""
    import yaml

    arguments = parse_arguments(model, engine)
    shown: dict[str, Any] = {"model": model}
    for config in (server, arguments.engine, arguments.frontend):
        values = msgspec.to_builtins(config)
        shown |= {name: values[name] for name in field_types(type(config)) if name not in SECRETS}
    if shown["speculative_config"] is not None:
        # Resolved again from the draft model's name, like the model's own path.
        del shown["speculative_config"]["model_path"]
    print(yaml.safe_dump(shown, sort_keys=False), end="")
    if server.api_key:
        print(f"# api_key: {len(server.api_key)} keys, not shown")
