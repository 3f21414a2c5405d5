"""Sempre: LLM inference whose outputs are reproducible bit for bit.

    from sempre import LLM, SamplingParams

    with LLM("tiny") as llm:
        print(llm.generate("It is a truth", SamplingParams(max_tokens=32, seed=1))[0].outputs[0].text)

setup.cfg makes this file the package `sempre`: every public name of `sempre.engine`, imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sempre.engine import *  # noqa: F403
    from sempre.engine import __version__ as __version__


def __getattr__(name: str) -> object:
    engine = import_module("sempre.engine")
    if name != "__all__" and name not in engine.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(engine, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("sempre.engine").__all__})
