"""SIGUSR2 replaces the engine beneath a running server: no connection is closed, and no bit changes.

The address, the connections and the API processes stay; coordinator and workers are replaced by new processes, which
load the installed package anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from sempre.engine.client.successor import RestartOrder
from sempre.ipc.errors import SempreError

logger = logging.getLogger(__name__)


class RollingRestart:
    """One replacement at a time; one that fails is logged, and the running engine goes on if it can."""

    def __init__(self, replace: Callable[[RestartOrder], Awaitable[None]], order: RestartOrder) -> None:
        self._replace = replace
        self._order = order
        self._running: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin a replacement at each signal from now on."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self._begin)

    async def close(self) -> None:
        """Give up a replacement that has not ended."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR2)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _begin(self) -> None:
        if self._running is not None and not self._running.done():
            logger.warning("a signal to replace the engine is ignored: it is being replaced")
            return
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        began = time.monotonic()
        logger.info("the engine is being replaced (%s)", self._order)
        try:
            await self._replace(self._order)
        except (SempreError, OSError) as error:
            logger.error("the engine was not replaced: %s", error)
        else:
            logger.info("the engine was replaced after %.2f s", time.monotonic() - began)
