"""Start, signals and shutdown of the server.

starting  ── the address is bound; /live 200, /ready and requests 503; settings may still be refused
listening ── ready
          ── the engine ends ── exit code 4, or requests 503 until a new engine is ready (on_engine_death)
SIGTERM or SIGINT ── draining: new requests 503, running ones have shutdown_timeout ── aborted ── engine ended
a second signal ── abort and end at once
SIGUSR2 ── the engine is replaced, and running requests continue
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn

from sempre.engine.async_llm import AsyncLLM
from sempre.engine.server.activity import log_activity
from sempre.engine.server.app import create_app
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.connections import ConnectionGuard
from sempre.engine.server.errors import Busy
from sempre.engine.server.ledger import Place
from sempre.engine.server.protocol import BoundedProtocol
from sempre.engine.server.rolling_restart import RollingRestart
from sempre.engine.server.service import Service
from sempre.ipc.errors import ConfigError, SempreError
from sempre.ipc.liveness import collect_garbage_rarely

logger = logging.getLogger(__name__)

_DRAIN_LOOK_S = 0.05
_CLOSE_S = 5
# between attempts to restart an engine; doubles after each
_RESTART_PAUSE_S = 1.0
_MOST_RESTART_PAUSE_S = 60.0
_BACKLOG = 2048
# uvloop accepts one connection per pass and socket: a health check would wait a pass for each that came before it
_MORE_ACCEPTS = 7
# how long a thread may hold the GIL while the event loop is waiting
_SWITCH_S = 0.001


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One run of the server."""

    def __init__(self, engine: AsyncLLM, config: ServerConfig, address: str, place: Place | None = None) -> None:
        """`place`: which of several API processes this is. Raises ConfigError for unusable keys."""
        self._config = config
        self._address = address
        self._engine = engine
        self._service = Service(engine, config, place)
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._restart = self._rolling_restart()

    async def run(self, listening: socket.socket) -> None:
        """Serve until a signal. Raises the errors of the engine's start, and EngineDeadError if the engine ends."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if self._restart is not None:
            self._restart.watch()
        http = _HttpServer(self._uvicorn_config())
        sockets = [listening, *(listening.dup() for _ in range(_MORE_ACCEPTS))]
        serving = asyncio.create_task(http.serve(sockets=sockets))
        reporting = self._report_activity()
        try:
            if await self._start_engine(self._engine.start(), began) and await self._serve():
                await self._drain()
        finally:
            self._service.abort_all(Busy("The server is shutting down.", 1))
            http.should_exit = True
            http.force_exit = self._stop_now.is_set()
            if reporting is not None:
                reporting.cancel()
            await serving
            await self._service.offload.close()
            if self._restart is not None:
                await self._restart.close()
            self._engine.shutdown()

    def _rolling_restart(self) -> RollingRestart | None:
        return RollingRestart(self._engine.rolling_restart, self._config.restart_order)

    def _report_activity(self) -> asyncio.Task[None] | None:
        interval_s = self._config.log_stats_interval
        return asyncio.create_task(log_activity(self._service, interval_s)) if interval_s else None

    async def _serve(self) -> bool:
        """Serve until a signal, restarting the engine if configured. Raises EngineDeadError. Returns False if a signal
        came while there was no engine."""
        while await self._unless_stopped(ending := asyncio.create_task(self._engine.wait_for_end())):
            error = ending.result()
            self._service.pause()
            logger.error("the engine has ended: %s", error)
            await self._wait_until_idle(_CLOSE_S)  # running requests get their error
            if self._config.on_engine_death == "exit":
                raise error
            if not await self._restart_engine():
                return False
        return True

    async def _restart_engine(self) -> bool:
        """Return False if a signal came first."""
        pause_s = _RESTART_PAUSE_S
        while not self._stop.is_set():
            logger.warning("the engine is started again")
            try:
                return await self._start_engine(self._engine.restart(), time.monotonic())
            except (SempreError, OSError) as error:
                logger.error("the engine does not start: %s; the next attempt follows in %g s", error, pause_s)
            await self._unless_stopped(asyncio.create_task(asyncio.sleep(pause_s)))
            pause_s = min(2 * pause_s, _MOST_RESTART_PAUSE_S)
        return False

    async def _unless_stopped(self, task: asyncio.Task[Any]) -> bool:
        """Wait for a task; if a signal comes first, cancel it and return False."""
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            return False
        stopping.cancel()
        return True

    async def _start_engine(self, start: Coroutine[Any, Any, None], began: float) -> bool:
        """Return False if a signal came first. Raises the errors of the start."""
        starting = asyncio.create_task(start)
        if not await self._unless_stopped(starting):
            return False
        starting.result()
        seconds = time.monotonic() - began
        # Garbage collections need not scan objects that live as long as the server.
        gc.collect()
        gc.freeze()
        collect_garbage_rarely()
        await self._service.adapters.start()
        await self._service.offload.start()
        self._service.serve({**self._engine.ready.phase_seconds, "total": seconds})
        self._tell_ready(seconds)
        return True

    def _tell_ready(self, seconds: float) -> None:
        ready = self._engine.ready
        logger.info("fingerprint %s, seed %d", self._engine.fingerprint, self._engine.config.seed)
        logger.info(
            "KV cache: %d blocks of %d tokens and %d bytes; up to %d tokens per sequence, %d sequences at a time",
            ready.num_blocks,
            ready.block_size,
            ready.kv_block_bytes,
            ready.max_model_len,
            self._service.admission.max_running,
        )
        logger.info("ready after %.2f s, listening on %s", seconds, self._address)
        page = page_address(self._config, self._address)
        if page is not None:
            logger.info("the page is at %s", page)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def _drain(self) -> None:
        admission = self._service.admission
        admission.draining = True
        logger.info(
            "shutting down: requests in progress: %d, with %g s to finish; a second signal ends them now",
            self._service.num_requests,
            self._config.shutdown_timeout,
        )
        await self._wait_until_idle(self._config.shutdown_timeout)
        if self._service.num_requests:
            logger.warning("%d requests are aborted", self._service.num_requests)

    async def _wait_until_idle(self, timeout_s: float) -> None:
        """Return when no request is left, at the timeout, or at the second signal."""
        deadline = time.monotonic() + timeout_s
        while self._service.num_requests and time.monotonic() < deadline and not self._stop_now.is_set():
            await asyncio.sleep(_DRAIN_LOOK_S)

    def _uvicorn_config(self) -> uvicorn.Config:
        config = self._config
        return uvicorn.Config(
            create_app(self._service, self._service.keys),
            # called like the class
            http=partial(BoundedProtocol, ConnectionGuard(config)),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=round(config.keep_alive_timeout),
            timeout_graceful_shutdown=_CLOSE_S,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            ssl_ca_certs=config.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs is not None else ssl.CERT_NONE,
        )


def serve(engine: AsyncLLM, config: ServerConfig) -> None:
    """Serve `engine` until a signal.

    Raises ConfigError for an address in use or unusable TLS files, the errors of the engine's start, and
    EngineDeadError if the engine ends, unless `on_engine_death` is "restart".
    """
    listen_and_run(config, lambda listening, where: Server(engine, config, where).run(listening))


def listen_and_run(config: ServerConfig, run: Callable[[socket.socket, str], Coroutine[Any, Any, None]]) -> None:
    """Bind the address and run `run` with the socket and the address in words.

    Raises ConfigError for an address in use or unusable TLS files, and the errors of `run`.
    """
    check_tls(config)
    listening = listen(config)
    kind = "https" if config.ssl_certfile is not None else "http"
    where = config.uds or f"{kind}://{config.host}:{listening.getsockname()[1]}"
    logger.info("starting on %s (process %d): requests get 503 until it is ready", where, os.getpid())
    if is_open(config):
        logger.warning(
            "anyone who can reach port %s of this machine can use the server: set --api-key-file, or --host 127.0.0.1",
            where.rpartition(":")[2],
        )

    try:
        run_in_loop(run(listening, where))
    finally:
        listening.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)


def run_in_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run in an event loop for a server. Raises the errors of `work`."""
    sys.setswitchinterval(_SWITCH_S)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(work)


def listen(config: ServerConfig) -> socket.socket:
    """Return the bound socket. Raises ConfigError if the address is unavailable."""
    family = socket.AF_UNIX if config.uds else socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        if config.uds is not None:
            found.bind(config.uds)
        else:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((config.host, config.port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        where = config.uds or f"{config.host}:{config.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}.", parameter="port", value=where) from error
    return found


def is_open(config: ServerConfig) -> bool:
    """Whether other machines can reach the server, and need no key."""
    if config.uds is not None or config.api_key or config.api_key_file is not None or config.ssl_ca_certs is not None:
        return False
    if config.host == "localhost":
        return False
    try:
        return not ip_address(config.host).is_loopback
    except ValueError:  # a name
        return True


def page_address(config: ServerConfig, address: str) -> str | None:
    """The page's address for a browser on this machine; none for a Unix socket."""
    if config.uds is not None:
        return None
    kind, port = address.partition(":")[0], address.rpartition(":")[2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{kind}://{host}:{port}{config.root_path.rstrip('/')}/"


def check_tls(config: ServerConfig) -> None:
    """Load the TLS files once, before anything is started. Raises ConfigError naming the unusable one."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(config, name)
        try:
            if path is not None:
                Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} {path} cannot be read: {error.strerror}.", parameter=name) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Never prompt at the terminal: a key with a password is refused.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"ssl_certfile {config.ssl_certfile} and ssl_keyfile {config.ssl_keyfile} are no certificate and its key "
            f"without a password, in PEM: {error}.",
            parameter="ssl_certfile",
        ) from error
    try:
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except ssl.SSLError as error:
        raise ConfigError(
            f"ssl_ca_certs {config.ssl_ca_certs} holds no certificates in PEM: {error}.", parameter="ssl_ca_certs"
        ) from error


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not available on every platform
        return None
    return uvloop.Loop
