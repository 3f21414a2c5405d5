"""Flags generated from the fields of the settings, so that both always agree."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from sempre.engine.arguments import SAME_VALUES, SHORT_SPECULATION, FrontendConfig, field_types
from sempre.engine.cli.parser import Required, UsageError
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.setting_values import description, options, read_size
from sempre.engine.structured_outputs import CONFIG_MEMBERS
from sempre.engine.vllm_settings import VLLM_KEYWORDS
from sempre.ipc.config import EngineConfig

SAMPLING_SEED = "sampling_seed"
_REPEATED = ("stop", "bad_words")
_ALIASES = {
    "compilation_config": ("-cc",),
    "data_parallel_size": ("-dp",),
    "enable_expert_parallel": ("-ep",),
    "nnodes": ("-n",),
    "node_rank": ("-r",),
    "pipeline_parallel_size": ("-pp",),
    "speculative_config": ("-sc",),
    "tensor_parallel_size": ("-tp",),
}
_NESTED = "structured_outputs_config"
_MODEL = "name (tiny, smollm2-135m), folder, or hub id"
_NO_MODEL = "; the model `tiny` is always available: --model tiny"
# the engine has a flag of the name `stream_interval`; ids to score belong to one prompt
_NOT_FLAGS = ("output_kind", "stream_interval", "prompt_logprob_token_ids", "prompt_logprob_start")


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, for a command that can do without; where it cannot, `model_of` reports its absence."""
    parser.add_argument("--model", metavar="MODEL", help=_MODEL)


def add_required_model_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, for a command that always needs one."""
    parser.add_argument("--model", action=Required, metavar="MODEL", help=_MODEL, missing=_NO_MODEL)


def model_of(namespace: argparse.Namespace) -> str:
    """Return the model's name. Raises UsageError when none is given."""
    model: str | None = namespace.model
    if model is None:
        raise UsageError(f"--model is missing{_NO_MODEL}")
    return model


def add_engine_flags(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add flags for the fields of EngineConfig and FrontendConfig and vLLM's other keywords, except `without`."""
    add_config_flags(parser, "engine", EngineConfig, FrontendConfig)
    group = parser.add_argument_group("speculation, in short")
    for name, hint in SHORT_SPECULATION.items():
        _add_flag(group, name, hint, "default: none")
    add_vllm_flags(parser, {name: values for name, values in VLLM_KEYWORDS.items() if name not in without})
    for member in CONFIG_MEMBERS:
        name = f"{_NESTED}.{member}"
        keywords: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(*_flags(name), type=_json_or_text, nargs="?", const=True, **keywords)


def add_vllm_flags(parser: argparse.ArgumentParser, settings: Mapping[str, tuple[object, ...]]) -> None:
    """Add flags that help does not list: their values are accepted or refused like the keywords of `LLM`."""
    for name, accepted in settings.items():
        _add_vllm_flag(parser, name, accepted)


def add_config_flags(parser: argparse.ArgumentParser, title: str, *configs: type[msgspec.Struct]) -> None:
    """Add a flag for every field of `configs` that a user may set."""
    group = parser.add_argument_group(title)
    for config in configs:
        fields = {field.name: field for field in msgspec.structs.fields(config)}
        for name, hint in field_types(config).items():
            default = fields[name].default
            _add_flag(group, name, hint, f"default: {'none' if default is msgspec.NODEFAULT else default}")


def config_values(namespace: argparse.Namespace, config: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the fields of `config` that were given."""
    return given_values(namespace, field_types(config))


def given_values(namespace: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Return the flags in `names` that were given."""
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def add_sampling_flags(
    parser: argparse.ArgumentParser, *, without: Collection[str] = (), defaults: dict[str, object] | None = None
) -> None:
    """Add a flag for every field of SamplingParams except `without`; `defaults` override the struct's.

    The seed of a request is `--sampling-seed`; `--seed` is the engine's, from which it is derived otherwise.
    """
    group = parser.add_argument_group("sampling", "The default is the model's own, or else the one below.")
    hints = get_type_hints(SamplingParams, include_extras=True)
    for field in dataclasses.fields(SamplingParams):
        if field.name in _NOT_FLAGS or field.name in without:
            continue
        default = (defaults or {}).get(field.name, field.default)
        _add_flag(group, _flag_name(field.name), hints[field.name], f"default: {default}")


def engine_keywords(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the engine keywords that were given."""
    values = config_values(namespace, EngineConfig) | config_values(namespace, FrontendConfig)
    nested = given_values(namespace, [f"{_NESTED}.{member}" for member in CONFIG_MEMBERS])
    if nested:
        members = {name.removeprefix(f"{_NESTED}."): value for name, value in nested.items()}
        values[_NESTED] = {**(values.get(_NESTED) or {}), **members}
    return values | given_values(namespace, (*SHORT_SPECULATION, *VLLM_KEYWORDS))


def sampling_field_names() -> list[str]:
    """Return the fields of SamplingParams that a user sets by name."""
    return [field.name for field in dataclasses.fields(SamplingParams) if field.name not in _NOT_FLAGS]


def sampling_keywords(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling keywords that were given."""
    names = sampling_field_names()
    return {name: getattr(namespace, _flag_name(name)) for name in names if hasattr(namespace, _flag_name(name))}


def _flag_name(field: str) -> str:
    return SAMPLING_SEED if field == "seed" else field


def _add_flag(group: Any, name: str, hint: Any, default: str) -> None:
    # a flag's value is never None: leave the flag out for that
    kind = next(option for option in options(hint) if option is not type(None))
    keywords: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": f"{description(hint)} ({default})".replace("%", "%%"),
    }
    if kind is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif name in _REPEATED:
        keywords.update(action="append", metavar="TEXT")
    elif get_origin(kind) is list and get_args(kind) == (str,):
        keywords.update(action="extend", nargs="+", metavar="TEXT")
    elif get_origin(kind) is Literal:
        keywords["choices"] = (*get_args(kind), *SAME_VALUES.get(name, ()))
    elif name in SAME_VALUES:
        keywords.update(type=_integer_or(SAME_VALUES[name]), metavar="N")
    else:
        converter, keywords["metavar"] = _converter(kind)
        keywords["type"] = converter
    group.add_argument(*_flags(name), **keywords)


def _add_vllm_flag(parser: argparse.ArgumentParser, name: str, accepted: tuple[object, ...]) -> None:
    keywords: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if any(isinstance(value, bool) for value in accepted):
        keywords["action"] = argparse.BooleanOptionalAction
    elif any(isinstance(value, list) and value for value in accepted):
        keywords.update(action="extend", nargs="+")
    else:
        keywords["type"] = _json_or_text
    parser.add_argument(*_flags(name), **keywords)


def _flags(name: str) -> list[str]:
    return ["--" + name.replace("_", "-"), *_ALIASES.get(name, ())]


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _converter(kind: Any) -> tuple[Callable[[str], Any], str]:
    if kind is int:
        return _integer, "N"
    if kind is float:
        return float, "X"
    if kind is str:
        return str, "TEXT"
    if get_origin(kind) is list and get_args(kind) == (int,):
        return _integers, "N,N,…"
    return json_object, "JSON"


def _integer_or(words: Mapping[object, object]) -> Callable[[str], object]:
    return lambda text: text if text in words else _integer(text)


def _integer(text: str) -> int:
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; a `type` for argparse."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"5": 1.5}}, got {text!r}')
    return value
