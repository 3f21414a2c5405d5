"""Several API processes in front of one engine: `sempre serve --api-server-count`.

    supervisor ── owns the address, the engine and the processes; answers no request
        ├─ coordinator ── workers
        └─ API process 0 … n-1 ── accept from one socket; each a client of the coordinator

An API process that ends is replaced; its own requests alone are aborted. When the engine is being started again, the
processes wait, and their requests continue. What they share, a server of one process would keep for itself: the counts
of requests without a seed, the limits of keys and of the queue, and the figures of /metrics.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from sempre.engine.arguments import parse_arguments
from sempre.engine.child_process import RestartBudget, child_environment
from sempre.engine.client.asynchronous import AsyncProcessClient
from sempre.engine.client.attached import Attach, EngineEnded, EngineLost, OwnerNews
from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.client.successor import RestartOrder
from sempre.engine.frontend.progress import StartupNotice
from sempre.engine.frontend.session import check_refused
from sempre.engine.server.api_process import SERVING, ApiProcessArguments
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.rolling_restart import RollingRestart
from sempre.engine.server.run import listen_and_run
from sempre.ipc.config import EngineConfig
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.errors import ConfigError, EngineDeadError, ProtocolError, SempreError, StartupError
from sempre.ipc.messages import AdmitClient, DropClient

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
# beyond shutdown_timeout, for the process itself
_END_S = 10.0


class Launch(NamedTuple):
    """The engine: its model and the keywords of AsyncLLM."""

    model: str
    engine: dict[str, Any]
    debug: bool


class _ApiProcess:
    """One API process, and its successors."""

    def __init__(self, arguments: ApiProcessArguments) -> None:
        self._arguments = arguments
        self.process: Process | None = None

    async def start(self, listening: socket.socket) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "sempre.engine.server.api_process",
            stdin=PIPE,
            stdout=PIPE,
            env=child_environment(),
            pass_fds=[listening.fileno()],
            # signals of the terminal are for the supervisor
            start_new_session=True,
        )
        self.process = process
        self._write(msgspec.json.encode(self._arguments))
        return process

    def tell(self, news: OwnerNews) -> None:
        self._write(msgspec.json.encode(news))

    def _write(self, line: bytes) -> None:
        if self.process is not None and self.process.stdin is not None and self.process.returncode is None:
            with suppress(OSError):
                self.process.stdin.write(line + b"\n")

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """One run of the server."""

    def __init__(self, launch: Launch, config: ServerConfig, address: str) -> None:
        self._engine = parse_arguments(launch.model, launch.engine).engine
        self._config = config
        self._client: AsyncProcessClient | None = None
        self._directory = PrivateDirectory.create()
        self._launch = launch
        self._address = address
        self._budget = RestartBudget(self._engine.max_restarts, self._engine.restart_window_s)
        self._stop = asyncio.Event()
        self._stopping = False
        self._restart = RollingRestart(self._replace_engine, config.restart_order)
        self._processes: list[_ApiProcess] = []

    async def run(self, listening: socket.socket) -> None:
        """Serve until a signal. Raises the errors of the engine's start, EngineDeadError if it ends, StartupError if
        API processes keep ending."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._restart.watch()
        self._processes = [
            _ApiProcess(self._arguments(index, listening)) for index in range(self._config.api_server_count)
        ]
        keeping = [asyncio.create_task(self._keep(process, listening)) for process in self._processes]
        working = [asyncio.create_task(self._run_engine()), *keeping]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([*working, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                await self._drain(keeping)
            for task in done - {stopping}:
                self._end_all(task.exception())
                task.result()
        finally:
            await self._restart.close()
            for task in (*working, stopping):
                task.cancel()
            await asyncio.gather(*working, stopping, return_exceptions=True)
            await self._close()

    def _arguments(self, index: int, listening: socket.socket) -> ApiProcessArguments:
        return ApiProcessArguments(
            model=self._launch.model,
            engine=self._launch.engine,
            server=msgspec.to_builtins(self._config),
            index=index,
            count=self._config.api_server_count,
            directory=str(self._directory.path),
            listening=listening.fileno(),
            address=self._address,
            debug=self._launch.debug,
        )

    async def _run_engine(self) -> None:
        """Start the engine, then read its events, which drives its restarts. Raises its errors."""
        options = ProcessOptions(directory=self._directory)
        with StartupNotice(self._engine.model) as notice:
            client = await AsyncProcessClient.launch(self._engine, options=options, on_progress=notice.phase_ended)
        self._client = client
        for process in self._processes:
            self._attach(process)
        watching = asyncio.create_task(self._tell_of_engine(client))
        try:
            while True:
                try:
                    check_refused(await client.receive())
                except ProtocolError as error:
                    logger.warning("%s", error)
        finally:
            watching.cancel()

    def _attach(self, process: _ApiProcess) -> None:
        """Let a process in, once it and the engine run."""
        client = self._client
        if client is None or process.process is None:
            return
        client.send(AdmitClient(pid=process.process.pid))
        if client.outage is None:
            process.tell(_attach_to(client))

    async def _replace_engine(self, order: RestartOrder) -> None:
        if self._client is None:
            raise EngineDeadError("it has not started yet")
        await self._client.replace(order)

    async def _tell_of_engine(self, client: AsyncProcessClient) -> None:
        """Tell the processes when the engine is being started again, and where it is ready again."""
        known: OwnerNews = _attach_to(client)
        while True:
            await asyncio.sleep(_LOOK_S)
            news = _attach_to(client) if client.outage is None else EngineLost(client.outage)
            if news != known:
                known = news
                for process in self._processes:
                    process.tell(news)

    async def _keep(self, process: _ApiProcess, listening: socket.socket) -> None:
        """Run a process and its successors until the server stops. Raises StartupError if they keep ending."""
        while True:
            began = time.monotonic()
            child = await process.start(listening)
            logger.debug("API process %d starts", child.pid)
            self._attach(process)
            assert child.stdout is not None
            if await child.stdout.readline() == SERVING:
                logger.info("API process %d serves after %.2f s", child.pid, time.monotonic() - began)
            code = await child.wait()
            self._forget(child.pid)
            if self._stopping:
                return
            ending = f"an API process (pid {child.pid}) ended with exit code {code}"
            if not self._budget.take():
                raise StartupError(f"{ending}; {self._budget.exhausted()}")
            logger.error("%s: its requests are aborted, and it is replaced", ending)

    def _forget(self, pid: int) -> None:
        if self._client is not None:
            with suppress(SempreError):
                self._client.send(DropClient(pid=pid))

    def _on_signal(self) -> None:
        if self._stopping:
            for process in self._processes:
                process.signal(signal.SIGTERM)
        self._stopping = True
        self._stop.set()

    async def _drain(self, keeping: list[asyncio.Task[None]]) -> None:
        """Every process finishes its requests and ends."""
        logger.info(
            "shutting down: %d API processes finish their requests; a second signal ends them now", len(keeping)
        )
        for process in self._processes:
            process.signal(signal.SIGTERM)
        await asyncio.wait(keeping, timeout=self._config.shutdown_timeout + _END_S)

    def _end_all(self, error: BaseException | None) -> None:
        """The engine has ended, or a process could not be replaced: requests get the error."""
        self._stopping = True
        for process in self._processes:
            process.tell(EngineEnded(str(error)))

    async def _close(self) -> None:
        """End what is left: the processes, then the engine."""
        children = [each.process for each in self._processes if each.process is not None]
        ends = [asyncio.create_task(child.wait()) for child in children if child.returncode is None]
        if ends:
            _, late = await asyncio.wait(ends, timeout=_END_S if self._stopping else 0.0)
            for process in self._processes if late else ():
                process.signal(signal.SIGKILL)
            await asyncio.gather(*ends)
        if self._client is not None:
            self._client.close()
        self._directory.remove()


def _attach_to(client: AsyncProcessClient) -> Attach:
    return Attach(client.process.client_address, client.process.child.pid)


def check_supervised(config: ServerConfig, engine: EngineConfig) -> None:
    """Raise ConfigError for settings that several API processes cannot keep."""
    refused = {
        "multiprocessing": not engine.multiprocessing,
        "allow_runtime_lora_updating": config.allow_runtime_lora_updating,
        "enable_sleep_mode": config.enable_sleep_mode,
        "on_engine_death": config.on_engine_death != "exit",
    }
    reasons = {
        "multiprocessing": "the engine needs a process of its own",
        "allow_runtime_lora_updating": "an adapter that one process loads would be unknown to the others",
        "enable_sleep_mode": "the process that puts the engine to sleep would alone know of it",
        "on_engine_death": "a supervisor outside, such as systemd or Kubernetes, restarts the server",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ConfigError(
                f"{name} cannot be used with api_server_count {config.api_server_count}: {reasons[name]}.",
                parameter=name,
            )


def supervise(launch: Launch, config: ServerConfig) -> None:
    """Serve with several processes until a signal. Raises the errors of `run.serve`, ConfigError for settings that need
    a single process, and StartupError if API processes keep ending."""
    check_supervised(config, parse_arguments(launch.model, launch.engine).engine)

    async def run(listening: socket.socket, where: str) -> None:
        await Supervisor(launch, config, where).run(listening)

    listen_and_run(config, run)
