"""Workers on several hosts, here all on loopback: the bits of one worker, and a named error where a host is missing,
has another key, or does not fit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from moments import in_a_moment
from workload import SETTINGS, check_alone, make_requests

from sempre.engine.harness import COORDINATOR, Cluster
from sempre.ipc.curve import make_key_file
from sempre.ipc.errors import ConfigError, ProtocolError, StartupError

START_S = 60.0
END_S = 15.0
BASE: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "model"}


class Agent:
    """`sempre serve --headless` in its own process."""

    def __init__(self, log_path: Path, flags: list[str]) -> None:
        self.log_path = log_path
        command = [sys.executable, "-m", "sempre.engine", "serve", "tiny", "--headless", *flags]
        with log_path.open("ab") as log_file:
            self.process = subprocess.Popen(command, stdout=log_file, stderr=log_file)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def exit_code(self) -> int:
        return self.process.wait(END_S)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Hosts:
    """Host 0 is this process's; its cluster and the agents of the others have one key file and one port."""

    def __init__(self, folder: Path, start: Callable[..., Cluster]) -> None:
        self.key_file = folder / "keys"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.agents: list[Agent] = []
        self._folder = folder
        self._start = start

    def settings(self, **settings: Any) -> dict[str, Any]:
        return {"nnodes": 2, "master_port": self.port, "node_key_file": str(self.key_file), **settings}

    def agent(self, number: int = 1, **settings: Any) -> Agent:
        given = self.settings(node_rank=number, **settings)
        flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
        self.agents.append(Agent(self._folder / f"node-{len(self.agents)}.log", flags))
        return self.agents[-1]

    def cluster(self, worker_module: str = "sempre.workers", **settings: Any) -> Cluster:
        return self._start(worker_module, **self.settings(**settings))

    def together(self, *, nnodes: int = 2, **layout: int) -> Cluster:
        """The engine on all of its hosts."""
        for number in range(1, nnodes):
            self.agent(number, nnodes=nnodes, **layout)
        return self.cluster(**BASE, nnodes=nnodes, **layout)


@pytest.fixture
def hosts(tmp_path: Path, start: Callable[..., Cluster]) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, start)
    yield hosts
    for agent in hosts.agents:
        agent.end()


def check_end(hosts: Hosts, cluster: Cluster) -> None:
    """All agents end with the engine, and nothing of them is left."""
    workers = [pid for agent in hosts.agents for pid in agent.workers()]
    cluster.close()
    assert [agent.exit_code() for agent in hosts.agents] == [0] * len(hosts.agents)
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    assert not hosts.key_file.exists()


@pytest.mark.product
def test_two_hosts_are_as_one(hosts: Hosts) -> None:
    """Each has one of the two ranks, whose sums travel between them."""
    cluster = hosts.together(tensor_parallel_size=2)
    [agent] = hosts.agents
    assert agent.workers() == cluster.worker_pids()[1:]
    assert hosts.key_file.stat().st_mode & 0o777 == 0o600
    first, second = cluster.rng_digests()
    assert first == second
    check_alone(cluster.generate(make_requests()), profile="tree8")
    assert "node 1 of 2" in agent.log
    # the key is not on any command line
    secret = hosts.key_file.read_text().strip()
    for pid in (agent.process.pid, cluster.coordinator_pid, *cluster.worker_pids()):
        assert secret not in " ".join(psutil.Process(pid).cmdline() + list(psutil.Process(pid).environ().values()))
    check_end(hosts, cluster)


@pytest.mark.product
@pytest.mark.parametrize(
    ("layout", "profile"),
    [
        ({"pipeline_parallel_size": 2}, "single"),
        ({"data_parallel_size": 2}, "single"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "tree8"),
        ({"pipeline_parallel_size": 4}, "single"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, "tree8"),
        ({"nnodes": 3, "pipeline_parallel_size": 3}, "single"),
    ],
    ids=["stages", "replicas", "stages of two ranks", "two stages each", "replicas of two ranks", "three hosts"],
)
def test_layouts(layout: dict[str, int], profile: str, hosts: Hosts) -> None:
    cluster = hosts.together(**layout)
    check_alone(cluster.generate(make_requests()), profile=profile)
    assert len({tuple(sorted(digests.items())) for digests in cluster.rng_digests()}) == 1
    check_end(hosts, cluster)


@pytest.mark.product
def test_a_rank_of_another_host_dies_in_the_middle(hosts: Hosts) -> None:
    cluster = hosts.together(tensor_parallel_size=2)
    with in_a_moment(lambda: cluster.kill(1)):
        check_alone(cluster.generate(make_requests()), profile="tree8")
    check_alone(cluster.generate(make_requests()), profile="tree8")
    check_end(hosts, cluster)


@pytest.mark.product
def test_an_agent_dies_and_another_comes(hosts: Hosts) -> None:
    """Its workers die with it, and requests go on when the host is back."""
    layout = {"pipeline_parallel_size": 2}
    hosts.agent(**layout)
    cluster = hosts.cluster(**BASE, **layout, heartbeat_timeout_s=2.0)
    [agent] = hosts.agents
    workers = agent.workers()

    def replace() -> None:
        agent.end()
        hosts.agent(**layout)

    with in_a_moment(replace):
        check_alone(cluster.generate(make_requests()))
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    hosts.agents.remove(agent)
    check_end(hosts, cluster)


@pytest.mark.product
def test_the_coordinator_dies_and_is_restarted(hosts: Hosts) -> None:
    cluster = hosts.together(pipeline_parallel_size=2)
    with in_a_moment(lambda: cluster.kill(COORDINATOR)):
        check_alone(cluster.generate(make_requests()))
    check_end(hosts, cluster)


@pytest.mark.product
def test_an_agent_that_is_told_to_end(hosts: Hosts) -> None:
    cluster = hosts.together(data_parallel_size=2)
    [agent] = hosts.agents
    workers = agent.workers()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.exit_code() == 0
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    cluster.close()


# Bad hosts


def test_a_host_that_does_not_come_is_named(hosts: Hosts) -> None:
    expected = (
        rf"node 1 of 2: not connected to tcp://127\.0\.0\.1:{hosts.port} within 1 s .*--node-rank 1 --master-addr"
    )
    with pytest.raises(StartupError, match=expected):
        hosts.cluster("light_worker", data_parallel_size=2, startup_timeout_s=1.0)
    assert not hosts.key_file.exists()


@pytest.mark.product
def test_host_0_that_cannot_be_reached_is_named(hosts: Hosts) -> None:
    make_key_file(hosts.key_file)
    agent = hosts.agent(data_parallel_size=2, startup_timeout_s=1.0)
    assert agent.exit_code() == 4
    expected = rf"node 1: host 0 cannot be reached at tcp://127\.0\.0\.1:{hosts.port} .*: Connection refused"
    assert re.search(expected, agent.log), agent.log


@pytest.mark.product
def test_a_host_with_another_key_gets_nothing(hosts: Hosts, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_key_file(other)
    agent = hosts.agent(data_parallel_size=2, node_key_file=str(other))
    with pytest.raises(StartupError, match="node 1 of 2: not connected"):
        hosts.cluster("light_worker", data_parallel_size=2, startup_timeout_s=10.0)
    assert agent.exit_code() == 4
    assert "does not accept this host's key" in agent.log


@pytest.mark.product
def test_a_host_with_other_settings_is_named(hosts: Hosts) -> None:
    agent = hosts.agent(data_parallel_size=4)
    with pytest.raises(StartupError, match=r"node 1 \(.*\): workers: expected 2, found 4; give all hosts the same"):
        hosts.cluster("light_worker", data_parallel_size=2)
    assert agent.exit_code() == 4
    assert "workers: expected 2, found 4" in agent.log


@pytest.mark.product
def test_a_host_that_joins_twice_is_refused(hosts: Hosts) -> None:
    cluster = hosts.together(data_parallel_size=2)
    second = hosts.agent(data_parallel_size=2)
    assert second.exit_code() == 4
    assert "node 1 has joined already, from" in second.log
    hosts.agents.remove(second)
    check_alone(cluster.generate(make_requests()))
    check_end(hosts, cluster)


@pytest.mark.product
def test_a_port_in_use_is_named(hosts: Hosts) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", hosts.port))
        other.listen()
        with pytest.raises(
            ProtocolError, match=rf"cannot bind tcp://127\.0\.0\.1:{hosts.port}: Address already in use"
        ):
            hosts.cluster("light_worker", data_parallel_size=2)


def test_only_host_0_has_an_engine(hosts: Hosts) -> None:
    with pytest.raises(ConfigError, match=r"node_rank=1: only host 0 has an engine to use"):
        hosts.cluster(node_rank=1, data_parallel_size=2)
    assert not os.listdir(hosts.key_file.parent)
