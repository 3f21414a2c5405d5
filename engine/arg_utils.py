"""The keywords of an engine as an object, like vLLM's."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from sempre.engine.arguments import (
    SHORT_SPECULATION,
    EngineKeywords,
    FrontendConfig,
    check_keywords,
    engine_keywords_of,
    field_types,
)
from sempre.engine.vllm_settings import VLLM_KEYWORDS
from sempre.ipc.config import EngineConfig

if TYPE_CHECKING:

    class EngineArgs:
        """The keywords of `LLM`, as attributes; `dataclasses.asdict` gives them back. `LLM.from_engine_args` takes it.

        Values are checked when an engine is created from them. Raises TypeError for an unknown keyword.
        """

        model: str | PathLike[str]

        def __init__(self, model: str | PathLike[str], **keywords: Unpack[EngineKeywords]) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

else:

    def _fields() -> list[tuple[str, Any, Any]]:
        defaults: dict[str, Any] = dict.fromkeys(("served_model_name", *SHORT_SPECULATION))
        for config in (EngineConfig, FrontendConfig):
            known = field_types(config)
            defaults |= {each.name: each.default for each in msgspec.structs.fields(config) if each.name in known}
        defaults |= {name: values[0] for name, values in VLLM_KEYWORDS.items()}
        return [
            (name, Any, field(default_factory=type(value)) if isinstance(value, dict | list) else field(default=value))
            for name, value in defaults.items()
        ]

    def _checked_new(cls: type, *values: Any, **keywords: Any) -> Any:
        check_keywords(cls.__name__, values, keywords)
        return object.__new__(cls)

    EngineArgs = make_dataclass(
        "EngineArgs",
        [("model", Any), *_fields()],
        namespace={
            "__new__": _checked_new,
            "__doc__": "The keywords of `LLM`, as attributes; `dataclasses.asdict` gives them back.",
            "__module__": __name__,
        },
    )

AsyncEngineArgs = EngineArgs


def keywords_of(engine_args: object) -> dict[str, Any]:
    """Return keywords for `LLM(**…)`. Raises TypeError for anything but EngineArgs."""
    if not isinstance(engine_args, EngineArgs):
        raise TypeError(f"engine_args must be EngineArgs, got {type(engine_args).__name__}.")
    return engine_keywords_of(vars(engine_args))
