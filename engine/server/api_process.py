"""One of several API processes: `python -m sempre.engine.server.api_process`, with ApiProcessArguments on stdin.

The supervisor owns the address and the engine. Each further line of stdin tells what has become of the engine; a line
on stdout says that this process serves. It ends with the supervisor, or on SIGTERM after its own requests.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from sempre.engine.async_llm import AsyncLLM
from sempre.engine.cli.exit_codes import EXIT_ENGINE, EXIT_OK
from sempre.engine.client import AsyncEngineClient
from sempre.engine.client.attached import AttachedClient, EngineEnded, OwnerNews
from sempre.engine.seed_counts import Numbering, SeedCounts
from sempre.engine.server.config import ServerConfig, server_config
from sempre.engine.server.ledger import Place
from sempre.engine.server.logs import set_up_logging
from sempre.engine.server.run import Server, run_in_loop
from sempre.ipc.errors import EngineDeadError
from sempre.ipc.liveness import die_with_parent_thread

SERVING = b"serving\n"


class ApiProcessArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the supervisor tells an API process at its start."""

    model: str
    engine: dict[str, Any]
    """keywords of AsyncLLM"""
    server: dict[str, Any]
    """the server's settings"""
    index: int
    count: int
    directory: str
    """of what the processes share"""
    listening: int
    """the descriptor of the bound socket"""
    address: str
    debug: bool = False


class AttachedLLM(AsyncLLM):
    """Uses an engine that the supervisor owns."""

    def __init__(
        self, model: str, news: asyncio.Queue[OwnerNews], numbering: Numbering, keywords: dict[str, Any]
    ) -> None:
        super().__init__(model, **keywords)
        self._news = news
        self._frontend.numbering = numbering

    async def _launch_client(self) -> AsyncEngineClient:
        return await AttachedClient.attach(self._frontend.config, self._news)


class ApiServer(Server):
    """Tells the supervisor, instead of the log, that it serves; the first one also logs the engine's activity."""

    def __init__(self, engine: AsyncLLM, arguments: ApiProcessArguments, config: ServerConfig) -> None:
        place = Place(arguments.index, arguments.count, Path(arguments.directory) / "ledger")
        super().__init__(engine, config, arguments.address, place)
        self._index = arguments.index

    def _tell_ready(self, seconds: float) -> None:
        if self._index == 0:
            super()._tell_ready(seconds)
        os.write(1, SERVING)

    def _rolling_restart(self) -> None:
        """The supervisor replaces the engine."""

    def _report_activity(self) -> asyncio.Task[None] | None:
        return super()._report_activity() if self._index == 0 else None


async def _serve(arguments: ApiProcessArguments, config: ServerConfig, lines: Iterator[bytes]) -> None:
    news: asyncio.Queue[OwnerNews] = asyncio.Queue()
    _follow(lines, asyncio.get_running_loop(), news)
    counts = SeedCounts(shared=Path(arguments.directory) / "seeds")
    numbering = Numbering(f"{os.getpid()}-", counts)
    engine = AttachedLLM(arguments.model, news, numbering, arguments.engine)
    try:
        await ApiServer(engine, arguments, config).run(socket.socket(fileno=arguments.listening))
    finally:
        counts.close()


def _follow(lines: Iterator[bytes], loop: asyncio.AbstractEventLoop, news: asyncio.Queue[OwnerNews]) -> None:
    """Put each line of the supervisor's into `news`, from a thread."""

    def follow() -> None:
        for line in lines:
            loop.call_soon_threadsafe(news.put_nowait, msgspec.json.decode(line, type=OwnerNews))
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.put_nowait, EngineEnded("the supervisor has ended"))

    threading.Thread(target=follow, name="supervisor-news", daemon=True).start()


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield lines as they come; without Python's buffered file, whose lock a waiting thread would hold at the end."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def main() -> int:
    """Serve until the supervisor or the engine has ended, or a signal."""
    die_with_parent_thread()
    lines = _lines(sys.stdin.fileno())
    arguments = msgspec.json.decode(next(lines), type=ApiProcessArguments)
    config = server_config(arguments.server)
    set_up_logging(config.log_format, debug=arguments.debug, uvicorn_level=config.uvicorn_log_level)
    try:
        run_in_loop(_serve(arguments, config, lines))
    except EngineDeadError:
        return EXIT_ENGINE  # the supervisor says why
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
