"""How engines are created, and their errors for missing attributes."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, Self, Unpack

from sempre.engine.arg_utils import EngineArgs, keywords_of
from sempre.engine.arguments import EngineKeywords, check_keywords
from sempre.engine.frontend.absent import absent


class EngineBase:
    """Base class of `LLM` and `AsyncLLM`."""

    def __new__(cls, *values: Any, **keywords: Any) -> Self:
        check_keywords(cls.__name__, values, keywords)
        return object.__new__(cls)

    if TYPE_CHECKING:

        def __init__(self, model: str | PathLike[str], **keywords: Unpack[EngineKeywords]) -> None: ...

    else:

        def __getattr__(self, name: str) -> Any:
            raise absent(type(self).__name__, name, dir(type(self)))

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """Create an engine with these keywords. Raises the constructor's errors."""
        return cls(**keywords_of(engine_args))
