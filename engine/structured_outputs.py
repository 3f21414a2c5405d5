"""The form an output must have: a JSON schema, any JSON object, a regular expression, a choice or a grammar.

`structured_outputs_config` holds the defaults of every form.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sempre.engine.near_names import near_name
from sempre.engine.structural_tags import parse_structural_tag
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_FLAGS = (
    "json_object",
    "disable_any_whitespace",
    "disable_additional_properties",
    "disable_fallback",
    "after_reasoning",
)
# members that change nothing: one library reads all forms
_ANYWAY: dict[str, tuple[object, ...]] = {
    "backend": ("auto", "guidance"),
    "disable_fallback": (True, False),
    "enable_in_reasoning": (False,),
    "reasoning_parser": ("",),
    "reasoning_parser_plugin": ("",),
}
# vLLM's libraries; every one of them gives the same forms
_OTHER_BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer")
# members that become defaults of a form, if forms have them
_DEFAULT_FLAGS = ("disable_any_whitespace", "disable_additional_properties")
CONFIG_MEMBERS = (*_ANYWAY, *_DEFAULT_FLAGS, "whitespace_pattern")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one constraint; the names are vLLM's.

    json                    a JSON schema (draft 2020-12), as a dict or a string
    regex                   a regular expression without look-around and back-references, matched as a whole
    choice                  one of these strings
    grammar                 a grammar in Lark's form, or in GBNF (rules with `::=`)
    json_object             True: any JSON object
    disable_any_whitespace  JSON without optional white space
    whitespace_pattern      a regular expression of the white space between two parts of JSON; by default at most two
                            characters, so that no output consists of it
    disable_additional_properties  objects have only the properties that their schema names, unless it says otherwise;
                            None, here and for white space: use the engine's structured_outputs_config
    disable_fallback        without effect: one library reads all forms
    structural_tag          free text with tagged parts that have a form, such as tool calls: vLLM's JSON, as text or a
                            dict (`structural_tags`)
    begins_after            leave the output free up to and including the first such text (a reasoning model's
                            "</think>"); the constraint applies after it and any white space
    after_reasoning         an output that begins with "<think>", or whose prompt ends with it, is free up to and
                            including "</think>"; other outputs are constrained from the first token; Gemma 4 has
                            "<|channel>" and "<channel|>" instead; for gpt-oss: the message on the channel `final` is
                            constrained; one on `analysis` may precede it

    Raises ConfigError (a ValueError) that names the field, TypeError for an unknown keyword.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool = False
    structural_tag: str | dict[str, Any] | None = None
    begins_after: str | None = None
    after_reasoning: bool = False

    def __new__(cls, **keywords: Any) -> StructuredOutputsParams:
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                near = near_name(name, known)
                hint = f" Did you mean {near!r}?" if near else ""
                raise TypeError(f"StructuredOutputsParams has no parameter {name!r}.{hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            several = "You can only use one kind of constraints for structured outputs. " if given else ""
            raise ConfigError(
                f"structured_outputs: {several}Expected exactly one of {', '.join(CONSTRAINTS)}, "
                f"found {' and '.join(given) or 'none'}.",
                parameter="structured_outputs",
                value=given,
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.structural_tag is not None:
            parse_structural_tag(self.structural_tag)
            if not isinstance(self.structural_tag, str):
                object.__setattr__(self, "structural_tag", json.dumps(self.structural_tag))
        for name in ("regex", "grammar", "begins_after", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _refusal(name, value, f"must be a string that is not empty, got {value!r}.")
        for name in _FLAGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise _refusal(name, value, f"must be True or False, got {value!r}.")
        if self.after_reasoning and self.begins_after is not None:
            raise _refusal("after_reasoning", True, "and begins_after both say where the form begins; give one.")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def constraint(self) -> str:
        """The name of the field that is set."""
        return next(name for name in CONSTRAINTS if getattr(self, name) not in (None, False))


def _refusal(name: str, value: object, rest: str) -> ConfigError:
    return ConfigError(f"structured_outputs.{name} {rest}", parameter=f"structured_outputs.{name}", value=value)


def _schema(value: object) -> str:
    """The schema as JSON text."""
    if isinstance(value, str):
        try:
            # the schema may hold numbers beyond float64; NaN is not JSON
            value = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise _refusal("json", value, f"is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise _refusal("json", value, f"must be a JSON schema, which is an object, got {type(value).__name__}.")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal("json", value, f"has no JSON form: {error}.") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _choices(value: object) -> list[str]:
    valid = isinstance(value, Sequence) and not isinstance(value, str)
    if not valid or not all(isinstance(item, str) for item in value):  # type: ignore[attr-defined]
        raise _refusal("choice", value, f"must be a list of strings, got {value!r}.")
    choices = list(value)  # type: ignore[call-overload]
    if not choices or "" in choices:
        raise _refusal("choice", value, f"must hold strings that are not empty, at least one, got {value!r}.")
    return list(dict.fromkeys(choices))


def structured_outputs_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the members of StructuredOutputsParams that `config` sets. Raises ConfigError naming a member."""
    defaults: dict[str, Any] = {}
    for name, value in (config or {}).items():
        shown = f"structured_outputs_config.{name}"
        if name in _DEFAULT_FLAGS or name == "whitespace_pattern":
            if not isinstance(value, bool if name in _DEFAULT_FLAGS else str | None):
                expected = "True or False" if name in _DEFAULT_FLAGS else "a string or None"
                raise ConfigError(f"{shown} must be {expected}, got {value!r}.", parameter=shown, value=value)
            defaults[name] = value
        elif name not in CONFIG_MEMBERS:
            near = near_name(name, CONFIG_MEMBERS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"structured_outputs_config has no member {name!r}.{hint}", parameter=shown, value=value)
        elif name == "backend" and value in _OTHER_BACKENDS:
            logger.warning("%s=%r: this engine reads all forms with guidance, which keeps the same ones", shown, value)
        elif not any(type(value) is type(same) and value == same for same in _ANYWAY.get(name, (False, None))):
            raise ConfigError(f"{shown}={value!r} is not supported by this engine. Leave it out.", parameter=shown)
    return defaults


def with_defaults(form: StructuredOutputsParams, defaults: Mapping[str, Any]) -> StructuredOutputsParams:
    """Return `form` with `defaults` for its unset members; all of them concern JSON."""
    if form.json is None and not form.json_object and form.structural_tag is None:
        return form
    changes = {name: value for name, value in defaults.items() if getattr(form, name) is None}
    if form.disable_any_whitespace:
        changes.pop("whitespace_pattern", None)
    return replace(form, **changes) if changes else form
