"""`--middleware`: ASGI middleware of the user's own around the application."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any, cast

from starlette.types import ASGIApp

from sempre.ipc.errors import ConfigError


def load_middleware(names: Sequence[str]) -> list[Any]:
    """Return what the dotted names stand for: classes made with the application, or coroutine functions that take a
    request and the way on. Raises ConfigError naming the one that is neither."""
    return [_load(name) for name in names]


def wrapped(app: ASGIApp, names: Sequence[str]) -> ASGIApp:
    """Return `app` within the middleware; the last one named is the outermost."""
    for middleware in load_middleware(names):
        found: Any = middleware
        if inspect.isclass(found):
            app = cast(Any, found)(app)
        else:
            from starlette.middleware.base import BaseHTTPMiddleware

            app = BaseHTTPMiddleware(app, dispatch=found)
    return app


def _load(name: str) -> Any:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"middleware {name!r} cannot be imported: {error}.", parameter="middleware") from error
    if not inspect.isclass(found) and not inspect.iscoroutinefunction(found):
        raise ConfigError(
            f"middleware {name!r} must be a class or a coroutine function, found {type(found).__name__}.",
            parameter="middleware",
        )
    return found
