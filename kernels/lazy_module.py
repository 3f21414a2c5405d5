"""Modules of a device's kernels, imported when a kernel is first called: whoever runs none of them pays for none."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


class LazyModule:
    """Stands in package `package` for its module `name`, as the variable `_name`, until it is first used; from then on
    that variable is the module itself. An import inside a function costs a microsecond in every call."""

    def __init__(self, package: str, name: str) -> None:
        self._package = package
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = import_module(f"{self._package}.{self._name}")
        setattr(sys.modules[self._package], f"_{self._name}", module)
        return getattr(module, attribute)
