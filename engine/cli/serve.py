"""`sempre serve`."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import msgspec

from sempre.engine.arguments import SHORT_SPECULATION, VLLM_KEYWORDS, FrontendConfig, field_types, parse_arguments
from sempre.engine.cli.arguments import add_config_flags, add_engine_flags, config_values, engine_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.config import EngineConfig
from sempre.engine.executor.threads import threads_beside_a_server
from sempre.engine.server.config import SECRETS, ServerConfig, server_config
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "SEMPRE_"
_ENGINE_SETTINGS = (*field_types(EngineConfig), *field_types(FrontendConfig), *SHORT_SPECULATION, *VLLM_KEYWORDS)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="name (tiny, …), folder, or hub id")
    parser.add_argument("--model", metavar="MODEL", help="the same")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, named as the flags are")
    parser.add_argument("--print-config", action="store_true", help="print the settings in use as YAML, and end")
    add_config_flags(parser, "server", ServerConfig)
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    settings = _settings(namespace)
    server = server_config({name: value for name, value in settings.items() if name in field_types(ServerConfig)})
    engine = {name: value for name, value in settings.items() if name in _ENGINE_SETTINGS}
    model = settings.get("model")
    if model is None:
        raise UsageError("which model? The model `tiny` is always at hand: sempre serve tiny")
    if not engine.get("num_threads"):
        # Checked before it is divided by.
        config = parse_arguments(model, engine).engine
        engine["num_threads"] = threads_beside_a_server(config.data_parallel_size * config.tensor_parallel_size)
    if namespace.print_config:
        _print_config(model, engine, server)
        return 0

    from sempre.engine.async_llm import AsyncLLM
    from sempre.engine.server.logs import set_up_logging
    from sempre.engine.server.run import api_keys, serve

    keys = api_keys(server)
    set_up_logging(server.log_format, debug=namespace.debug)
    if not keys and os.environ.get("VLLM_API_KEY"):
        logger.warning("VLLM_API_KEY is not read, so requests need no key; set %sAPI_KEY", ENVIRONMENT_PREFIX)
    serve(AsyncLLM(model, **engine), server)
    return 0


def _settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return what was set: a flag comes before the environment, that before the file."""
    path = namespace.config or os.environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    settings = {} if path is None else _from_file(path)
    settings |= _from_environment()
    settings |= config_values(namespace, ServerConfig) | engine_keywords(namespace)
    given = [model for model in (namespace.model_argument, namespace.model) if model is not None]
    if len(set(given)) > 1:
        raise UsageError(f"two models are given: {' and '.join(given)}")
    if given:
        settings["model"] = given[0]
    return settings


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", parameter="config") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold settings as `name: value`, found {type(found).__name__}.")
    settings = {str(name).replace("-", "_"): value for name, value in found.items()}
    known = {"model", *field_types(ServerConfig), *_ENGINE_SETTINGS}
    for name in settings:
        if name not in known:
            raise ConfigError(f"{path}: there is no setting {name!r}.", parameter=name)
    return settings


def _from_environment() -> dict[str, Any]:
    """Return the server's settings that the environment holds (SEMPRE_PORT, …), and the model.

    The engine's are not read from there: nothing that an output depends on should be set unseen.
    """
    settings: dict[str, Any] = {}
    for name in ("model", *field_types(ServerConfig)):
        text = os.environ.get(ENVIRONMENT_PREFIX + name.upper())
        if text is not None:
            settings[name] = text if name == "model" else _converted(name, text)
    return settings


def _converted(name: str, text: str) -> object:
    """Return a variable's text as its setting's type; lists are separated by commas."""
    kind = field_types(ServerConfig)[name]
    try:
        if msgspec.json.schema(kind).get("type") == "array":
            return [part.strip() for part in text.split(",")]
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        shown = "its value" if name in SECRETS else repr(text)
        raise ConfigError(f"{ENVIRONMENT_PREFIX}{name.upper()}: {shown} is refused: {error}", parameter=name) from None


def _print_config(model: str, engine: dict[str, Any], server: ServerConfig) -> None:
    """Print a file for `--config`; keys are left out."""
    import yaml

    arguments = parse_arguments(model, engine)
    shown: dict[str, Any] = {"model": model}
    for config in (server, arguments.engine, arguments.frontend):
        values = msgspec.to_builtins(config, enc_hook=str)
        shown |= {name: values[name] for name in field_types(type(config)) if name not in SECRETS}
    if shown["speculative_config"] is not None:
        # Found again from the draft model's name, as the model's own path is.
        del shown["speculative_config"]["model_path"]
    print(yaml.safe_dump(shown, sort_keys=False), end="")
    if server.api_key:
        print(f"# api_key: {len(server.api_key)} keys, not shown")
