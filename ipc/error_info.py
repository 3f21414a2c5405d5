"""Exceptions in transit: to an ErrorInfo, back to the same type, and to everyone waiting."""

from __future__ import annotations

import inspect
import traceback
from typing import TypeVar

from sempre.ipc import errors
from sempre.ipc.messages import ErrorInfo

_TRACEBACK_CHARS = 32_768

ErrorT = TypeVar("ErrorT", bound=BaseException)


def describe(error: BaseException, rank: int | None = None) -> ErrorInfo:
    """What another process needs to know of `error`; `rank` is the worker it happened in."""
    facts = vars(error) if isinstance(error, errors.SempreError) else {}
    text = "".join(traceback.format_exception(error))
    return ErrorInfo(
        type=type(error).__name__,
        message=str(error),
        rank=rank,
        traceback=text[-_TRACEBACK_CHARS:],
        facts={name: _fact(value) for name, value in facts.items()},
    )


def restore(info: ErrorInfo) -> errors.SempreError | None:
    """The original exception if it is one of the project's own; None for any other type."""
    kind = getattr(errors, info.type, None)
    if not (inspect.isclass(kind) and issubclass(kind, errors.SempreError)):
        return None
    wanted = inspect.signature(kind.__init__).parameters
    error: errors.SempreError = kind(info.message, **{k: v for k, v in info.facts.items() if k in wanted})
    return error


def again(error: ErrorT) -> ErrorT:
    """A copy of the error to raise: one object raised repeatedly accumulates every traceback."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy


def _fact(value: object) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64:
        return value
    return repr(value)
