"""A task that several callers wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


class SharedTask:
    """Runs `work` while somebody asks for it, once for all who ask meanwhile; whoever gives up does not end it.

    Its error is raised in all of them; who asks later runs it again.
    """

    def __init__(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._cause: BaseException | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None

    async def run(self) -> None:
        """Run it, or wait for whoever began. Raises its error, or that of `cancel`."""
        if self._task is None:
            self._task = asyncio.create_task(self._work())
            self._task.add_done_callback(self._ended)
        task = self._task
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self._cause is not None:
                raise self._cause from None
            raise

    def cancel(self, cause: BaseException) -> None:
        """End it; who waits gets the `cause`."""
        if self._task is not None:
            self._cause = cause
            self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # has been looked at, even if everybody gave up
