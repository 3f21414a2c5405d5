"""`AsyncLLM`: the call that replaces the processes of a running engine."""

from __future__ import annotations

from sempre.engine.client.successor import RestartOrder
from sempre.engine.sleep_calls import AsyncSleepLLM


class AsyncRestartLLM(AsyncSleepLLM):
    """Base class of `AsyncLLM`."""

    async def rolling_restart(self, order: RestartOrder = "auto") -> None:
        """Replace coordinator and workers by new processes; running requests continue there with the same bits.

        `order` is start-first (the new engine starts beside the running one, which is used until then), stop-first
        (requests wait while it starts), or auto: start-first on a CPU whose memory holds both. A new engine that fails
        to start or has another fingerprint is not used: the error is raised, and, with start-first, the running engine
        goes on. Raises ConfigError without multiprocessing, StartupError, CoordinatorDied.
        """
        await self._connected().replace(order)
