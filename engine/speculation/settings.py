"""Converts a user's settings to a SpeculativeConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from sempre.engine.near_names import near_name
from sempre.engine.setting_values import checked
from sempre.ipc.config import SpeculativeConfig, SpeculativeMethod
from sempre.ipc.errors import ConfigError

_FIELDS = tuple(name for name in SpeculativeConfig.__struct_fields__ if name != "model_path")
_SHORT = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
_METHODS: tuple[str, ...] = get_args(SpeculativeMethod)
# vLLM's method names that are given as a model
_NO_MODELS = ("ngram", "[ngram]")


def speculative_config(value: object, short: Mapping[str, object]) -> SpeculativeConfig | None:
    """`value` is a mapping, a SpeculativeConfig or None; `short` holds spec_method, spec_model, spec_tokens if given.

    None turns it off, and so does `num_speculative_tokens` 0. With a model, the default method is draft_model.
    The draft model is not resolved yet. Raises ConfigError.
    """
    if isinstance(value, SpeculativeConfig):
        value = {name: getattr(value, name) for name in _FIELDS}
    if value is not None and not isinstance(value, Mapping):
        raise _refused("speculative_config", value, "must be a mapping such as {'method': 'ngram'}")
    fields: dict[str, Any] = dict(value or {})
    for keyword, name in _SHORT.items():
        given = short.get(keyword)
        if given is not None and fields.setdefault(name, given) != given:
            raise _refused(keyword, given, f"says otherwise than speculative_config[{name!r}]={fields[name]!r}")
    if not fields or fields.get("num_speculative_tokens") == 0:
        return None
    for name in fields:
        if name not in _FIELDS:
            near = near_name(str(name), _FIELDS)
            hint = f"Did you mean {near!r}?" if near else f"Known: {', '.join(_FIELDS)}."
            raise _refused(f"speculative_config[{name!r}]", fields[name], f"is not a setting of speculation. {hint}")
    if fields.get("model") in _NO_MODELS and fields.get("method") in (None, "ngram"):
        fields |= {"method": "ngram", "model": None}
    if fields.get("method") is None and fields.get("model") is not None:
        fields["method"] = "draft_model"
    if fields.get("method") is None:
        given = " and ".join(f"{name}={value!r}" for name, value in fields.items())
        raise ConfigError(
            f"speculation with {given} needs a method: {', '.join(_METHODS)} (with a model).",
            parameter="speculative_config",
            value=value,
        )
    hints = get_type_hints(SpeculativeConfig, include_extras=True)
    config = SpeculativeConfig(
        **{name: checked(f"speculative_config[{name!r}]", given, hints[name]) for name, given in fields.items()}
    )
    _check_together(config)
    return config


def _check_together(config: SpeculativeConfig) -> None:
    uses_model = config.method == "draft_model"
    if uses_model and config.model is None:
        raise _bad(config, "model", "must name the draft model for method 'draft_model'")
    if not uses_model and config.model is not None:
        raise _bad(config, "model", f"must be left out for method {config.method!r}, which needs none")
    if not uses_model and config.placement != "colocated":
        raise _bad(config, "placement", f"must be left out for method {config.method!r}, which needs no worker")
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise _bad(config, "prompt_lookup_min", f"must be in [1, prompt_lookup_max={config.prompt_lookup_max}]")


def _bad(config: SpeculativeConfig, name: str, text: str) -> ConfigError:
    return _refused(f"speculative_config[{name!r}]", getattr(config, name), text)


def _refused(name: str, value: object, text: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} {text}", parameter=name.partition("[")[0], value=value)
