"""A coordinator and N workers over ZeroMQ on this machine, started through the ordinary client."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from sempre.engine.arguments import engine_config
from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.client.process import ProcessClient
from sempre.engine.harness.faults import Fault, FaultProxy
from sempre.engine.harness.generation import Generation, generate
from sempre.engine.harness.questions import Questions
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.messages import EngineReady, RequestSpec, WorkerHealth

COORDINATOR = "coordinator"


class Cluster:
    """An engine in processes that tests can inspect and damage.

    `settings` are those of `LLM` (data_parallel_size, max_num_seqs, heartbeat_timeout_s, …); `worker_module` is the
    worker program to run.
    Faults can be given at the start, or later through `worker_proxy.inject` and `client_proxy.inject`; a proxy exists
    only if its argument is not None.
    """

    def __init__(
        self,
        model: str,
        *,
        worker_faults: Sequence[Fault] | None = None,
        client_faults: Sequence[Fault] | None = None,
        worker_module: str = "sempre.workers",
        **settings: Any,
    ) -> None:
        """Raises the errors of `LLM` if the engine does not start."""
        self.config = engine_config(model, **settings)
        self.directory = PrivateDirectory.create()
        self.worker_proxy = self._proxy(worker_faults, "workers", self.directory.worker_address)
        self.client_proxy = self._proxy(client_faults, "client", self.directory.client_address)
        options = ProcessOptions(
            worker_module=worker_module,
            directory=self.directory,
            worker_connect=self.worker_proxy.address if self.worker_proxy else None,
            client_connect=self.client_proxy.address if self.client_proxy else None,
        )
        try:
            self.client = ProcessClient.launch(self.config, options=options)
        except BaseException:
            self._close_proxies()
            raise
        self._questions = Questions(self.client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()
        self._close_proxies()

    @property
    def ready(self) -> EngineReady:
        return self.client.ready

    @property
    def coordinator_pid(self) -> int:
        return self.client.process.child.pid

    def worker_pids(self) -> list[int]:
        """Process ids in rank order."""
        return self.ready.worker_pids

    def generate(self, requests: Sequence[RequestSpec], *, timeout_s: float = 120.0) -> list[Generation]:
        """Run all requests at once; return results in their order. Raises the errors of `generation.generate`."""
        return generate(self.client, requests, timeout_s=timeout_s)

    def call(self, method: str, *args: object) -> list[Any]:
        """Call a method of every worker; return results in rank order. Raises the first error."""
        return self._questions.call(method, *args)

    def rng_digests(self) -> list[dict[str, str]]:
        """The current digests of each rank's generators, by generator."""
        return self.call("rng_digests")

    def ranks(self) -> list[WorkerHealth]:
        """What the coordinator knows of each worker, targets first: process, step, digest, memory, stack if it lags."""
        return self._questions.ranks()

    def metrics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return self._questions.metrics()

    def kill(self, target: int | str) -> None:
        """Send SIGKILL to a rank or to COORDINATOR."""
        os.kill(self._pid(target), signal.SIGKILL)

    def stop(self, target: int | str) -> None:
        """Send SIGSTOP: the process still exists but does nothing."""
        os.kill(self._pid(target), signal.SIGSTOP)

    def resume(self, target: int | str) -> None:
        """SIGCONT."""
        os.kill(self._pid(target), signal.SIGCONT)

    def _pid(self, target: int | str) -> int:
        if target == COORDINATOR:
            return self.coordinator_pid
        if isinstance(target, int) and 0 <= target < len(self.worker_pids()):
            return self.worker_pids()[target]
        raise ValueError(f"target: expected a rank below {len(self.worker_pids())} or {COORDINATOR!r}, got {target!r}")

    def _proxy(self, faults: Sequence[Fault] | None, link: str, hub_address: str) -> FaultProxy | None:
        if faults is None:
            return None
        return FaultProxy(f"ipc://{self.directory.path}/{link}-proxy.sock", hub_address, faults)

    def _close_proxies(self) -> None:
        for proxy in (self.worker_proxy, self.client_proxy):
            if proxy is not None:
                proxy.close()
