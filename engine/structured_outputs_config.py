"""`structured_outputs_config`: what holds for every form that does not say otherwise itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sempre.engine.near_names import near_name
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.errors import ConfigError

# members that ask for what is done anyway: one library reads all forms, and none but it
_ANYWAY: dict[str, tuple[object, ...]] = {
    "backend": ("auto", "guidance"),
    "disable_fallback": (True, False),
    "enable_in_reasoning": (False,),
    "reasoning_parser": ("",),
    "reasoning_parser_plugin": ("",),
}
# members that become defaults of a form, as far as forms have them
_FLAGS = ("disable_any_whitespace", "disable_additional_properties")
MEMBERS = (*_ANYWAY, *_FLAGS, "whitespace_pattern")


def structured_outputs_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the members of StructuredOutputsParams that `config` sets. Raises ConfigError naming a member."""
    defaults: dict[str, Any] = {}
    for name, value in (config or {}).items():
        shown = f"structured_outputs_config.{name}"
        if name in _FLAGS or name == "whitespace_pattern":
            if not isinstance(value, bool if name in _FLAGS else str | None):
                expected = "True or False" if name in _FLAGS else "a string or None"
                raise ConfigError(f"{shown} must be {expected}, got {value!r}.", parameter=shown, value=value)
            defaults[name] = value
        elif name not in MEMBERS:
            near = near_name(name, MEMBERS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"structured_outputs_config has no member {name!r}.{hint}", parameter=shown, value=value)
        elif not any(type(value) is type(same) and value == same for same in _ANYWAY.get(name, (False, None))):
            raise ConfigError(f"{shown}={value!r} is not supported by this engine. Leave it out.", parameter=shown)
    return defaults


def with_defaults(form: StructuredOutputsParams, defaults: Mapping[str, Any]) -> StructuredOutputsParams:
    """Return `form` with `defaults` where it says nothing itself; all of them are about JSON."""
    if form.json is None and not form.json_object:
        return form
    changes = {name: value for name, value in defaults.items() if getattr(form, name) is None}
    if form.disable_any_whitespace:
        changes.pop("whitespace_pattern", None)
    return replace(form, **changes) if changes else form
