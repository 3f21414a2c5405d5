"""A sandbox for chat templates, which come with checkpoints and are untrusted programs.

It limits the time and the size of every value. A server renders in a process of its own, which also limits memory.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

MAX_CPU_S = 10.0
"""Seconds of CPU time for one conversation; a prompt of a million tokens takes about one second."""
MAX_SIZE = 1 << 24
"""Maximum characters or entries of one value, and the largest number passed to a function that may be a size."""

_TICKS_PER_LOOK = 32
# no number makes a result of these large
_PLAIN_FILTERS = (
    "abs", "attr", "count", "d", "default", "e", "escape", "first", "float", "forceescape", "int", "items", "last",
    "length", "list", "lower", "max", "min", "safe", "string", "sum", "title", "tojson", "trim", "upper",
)  # fmt: skip
_PLAIN_CALLS = ("Namespace", "append", "count", "dict", "get", "index", "pop", "raise_exception", "setdefault")
_WIDTH = re.compile(r"\d{7,}")


class _Budget(threading.local):
    """The remaining budget of the conversation that a thread renders."""

    deadline: float | None = None
    ticks = 0


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Raises SecurityError, a TemplateError, when a limit is exceeded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._budget = _Budget()
        self.filters = {
            name: found if name in _PLAIN_FILTERS else _guarded(found) for name, found in self.filters.items()
        }

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Context manager of one rendering."""
        budget = self._budget
        before = budget.deadline
        budget.deadline = time.thread_time() + MAX_CPU_S
        try:
            yield
        finally:
            budget.deadline = before

    def tick(self) -> str:
        """Called in every loop iteration and macro call."""
        budget = self._budget
        budget.ticks += 1
        if budget.ticks % _TICKS_PER_LOOK == 0 and budget.deadline is not None and time.thread_time() > budget.deadline:
            raise SecurityError(f"it takes more than {MAX_CPU_S:g} s")
        return ""

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute one operation, unless its result is too large."""
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # the names of these parameters cannot clash with a template's keyword arguments
    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method, unless its arguments are too large."""
        name = getattr(__obj, "__name__", "")
        if not isinstance(__obj, jinja2.runtime.Macro) and name not in _PLAIN_CALLS:
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            _check_call(name, (owner, *args) if isinstance(owner, str) else args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for node in list(template.find_all((jinja2.nodes.For, jinja2.nodes.Macro))):
            assert isinstance(node, jinja2.nodes.For | jinja2.nodes.Macro)
            # an attribute of the environment, which a template cannot replace
            ticking = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, jinja2.nodes.ExprStmt(ticking, lineno=node.lineno).set_environment(self))
        joined: jinja2.nodes.Template = _Joins().visit(template)
        return joined

    def joined(self, parts: list[Any]) -> str:
        """Join values as the operator ~ does."""
        texts = list(map(str, parts))
        _check_size(sum(map(len, texts)))
        return "".join(texts)


class _Joins(jinja2.visitor.NodeTransformer):
    """Turns the operator ~ into calls, since Jinja has no hook for its result."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Call:
        self.generic_visit(node)
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        call = jinja2.nodes.Call(
            jinja2.nodes.EnvironmentAttribute("joined"), [parts], [], None, None, lineno=node.lineno
        )
        if node.environment is not None:
            call.set_environment(node.environment)
        return call


def _check_operation(operator: str, left: Any, right: Any) -> None:
    match operator:
        case "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int):
                    _check_size(len(value) * times)
        case "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * right)
        case "%":
            if isinstance(left, str):
                _check_widths(left)
        case _:
            if isinstance(left, Sized) and isinstance(right, Sized):
                _check_size(len(left) + len(right))


def _check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check_size(abs(value))
    texts = [value for value in args if isinstance(value, str)]
    if name in ("replace", "do_replace") and len(texts) == 3:
        _check_size(texts[0].count(texts[1]) * len(texts[2]))
    elif name in ("format", "format_map", "do_format") and texts:
        _check_widths(texts[0])
    elif name in ("join", "do_join"):
        _check_joined(args, texts)


def _check_joined(args: tuple[Any, ...], texts: list[str]) -> None:
    separator = max(map(len, texts), default=0)
    _check_size(sum(separator * len(value) for value in args if isinstance(value, list | tuple)))


def _check_widths(form: str) -> None:
    if _WIDTH.search(form):
        raise SecurityError("a format has a width of more than 6 digits")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value or a number is larger than {MAX_SIZE}")


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments first; Jinja's marks on it are kept."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_call(function.__name__, args, kwargs)
        return function(*args, **kwargs)

    return guarded
