"""Middleware that makes a server slow: it works on the event loop for every request to /version."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

BUSY_S = 0.4


class Busy:
    """Named as `--middleware busy_middleware.Busy`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/version":
            end = time.thread_time() + BUSY_S
            while time.thread_time() < end:
                pass
        await self._app(scope, receive, send)
