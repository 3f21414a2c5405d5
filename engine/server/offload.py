"""Runs slow work off the event loop, in a thread or in a helper process, one job at a time per client.

Threads run libraries that release the GIL (tokenizers, llguidance) and write responses, where Python code shares the
GIL with the loop; a template that never ends needs a process. A client's jobs wait only for its own earlier jobs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec

from sempre.engine.server.errors import BadRequest, Busy
from sempre.engine.server.helper_process import MAX_CPU_S, MAX_MEMORY_BYTES
from sempre.ipc.errors import ConfigError, RequestError

Result = TypeVar("Result")

LONG_BYTES = 8 * 1024
"""Bodies from this size on are encoded and rendered off the event loop."""
_WAIT_S = 30.0
# a stopped or starved task uses no CPU time, so a CPU limit would not end it
_HELPER_S = 30.0
_RETRY_S = 5


class Offload:
    """The threads and the helper processes of one server: one for long or untrusted tasks, one for the rest."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2), thread_name_prefix="offload")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._helper = Helper(is_urgent=False)
        self._urgent_helper = Helper(is_urgent=True)
        self._turns: dict[str, _Turn] = {}

    async def in_thread(self, client: str, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return `function(*arguments)`. Raises its errors; Busy (503) for a client whose jobs take too long."""
        async with self._turn(client):
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def written(self, function: Callable[[], Result]) -> Result:
        """Return `function()`, run in another thread than the reading of requests. Raises its errors."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, function)

    async def in_helper(self, client: str, task: str, arguments: Mapping[str, Any]) -> Any:
        """Return the result of a task of `helper_process.TASKS`. Raises its error, BadRequest beyond its limits."""
        async with self._turn(client):
            return await self._helper.do(task, arguments)

    async def in_urgent_helper(self, task: str, arguments: Mapping[str, Any]) -> Any:
        """The same for a short task, which does not wait for the client's long ones."""
        return await self._urgent_helper.do(task, arguments)

    async def start(self) -> None:
        """Start the helper processes before they are needed."""
        await self._helper.start()
        await self._urgent_helper.start()

    async def close(self) -> None:
        """End the helper processes."""
        await self._helper.close()
        await self._urgent_helper.close()
        for threads in (self._threads, self._writer):
            threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(client, _Turn())
        turn.num_users += 1
        try:
            try:
                async with asyncio.timeout(_WAIT_S):
                    await turn.lock.acquire()
            except TimeoutError:
                raise Busy("Earlier requests of this client are still being read.", _RETRY_S) from None
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            turn.num_users -= 1
            if not turn.num_users:
                del self._turns[client]


class _Turn:
    """The lock for one client's jobs."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_users = 0


class Helper:
    """One helper process, started when needed and restarted after it exceeds its limits."""

    def __init__(self, *, is_urgent: bool) -> None:
        """A helper that is not urgent runs at lower priority."""
        self._options = [] if is_urgent else ["--nice"]
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def do(self, task: str, arguments: Mapping[str, Any]) -> Any:
        """Return the result of a task; see `Offload.in_helper`."""
        frame = msgspec.json.encode([task, arguments])
        async with self._lock:
            process = await self._started()
            try:
                async with asyncio.timeout(_HELPER_S):
                    succeeded, result = msgspec.json.decode(await _exchange(process, frame))
            except (asyncio.IncompleteReadError, ConnectionError):
                raise await self._ended(process) from None
            except TimeoutError:
                self._kill()
                raise _too_much_time() from None
            except BaseException:
                # the next task must not read this task's answer
                self._kill()
                raise
        if succeeded:
            return result
        raise _error(*result)

    async def start(self) -> None:
        """Start the process if there is none."""
        async with self._lock:
            await self._started()

    async def close(self) -> None:
        """End the process and wait for its exit."""
        process = self._process
        self._kill()
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            await process.stdout.read()
            await process.wait()

    def _kill(self) -> None:
        """Kill the process; the next task starts another one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "sempre.engine.server.helper_process",
                *self._options,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        return self._process

    async def _ended(self, process: asyncio.subprocess.Process) -> Exception:
        code = await process.wait()
        self._process = None
        return _too_much_time() if code == -signal.SIGXCPU else _too_much_memory()


async def _exchange(process: asyncio.subprocess.Process, frame: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(len(frame).to_bytes(4, "little") + frame)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    return await process.stdout.readexactly(size)


def _error(kind: str, message: str, parameter: str | None) -> Exception:
    match kind:
        case "MemoryError":
            return _too_much_memory()
        case "ConfigError":
            return ConfigError(message, parameter=parameter)
        case _:
            return RequestError(message, parameter=parameter)


def _too_much_time() -> BadRequest:
    return BadRequest(
        f"chat_template takes more than {MAX_CPU_S} s, the limit, for these messages.",
        param="messages",
    )


def _too_much_memory() -> BadRequest:
    return BadRequest(
        f"chat_template takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory, the limit, for these messages.",
        param="messages",
    )
