"""Settings of several hosts, and what launchers say of them."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.arguments import engine_config
from sempre.engine.cli.serve import _nodes_of_launcher
from sempre.engine.executor.base import device_index, draft_ranks, node_of, worker_config
from sempre.engine.nodes import nodes_of_environment, own_address
from sempre.ipc.endpoint import tcp_endpoint
from sempre.ipc.errors import ConfigError

TWO: dict[str, Any] = {"nnodes": 2, "node_key_file": "/keys", "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 2, "node_rank": 2}, r"node_rank=2 must be less than nnodes=2\."),
        ({"node_rank": 1}, r"node_rank=1 must be less than nnodes=1\."),
        ({"nnodes": 2, "data_parallel_size": 3}, r"nnodes=2 must divide the 3 workers \(data_parallel_size × "),
        ({"nnodes": 2}, r"nnodes=2 must divide the 1 workers"),
        ({"nnodes": 2, "data_parallel_size": 2}, r"nnodes=2 needs node_key_file: a file of mode 0600"),
        ({"nnodes": 2, "data_parallel_size": 2, "multiprocessing": False}, "nnodes=2 needs multiprocessing=True"),
        ({**TWO, "master_port": 0}, "master_port must be at least 1, got 0"),
        ({**TWO, "master_addr": "0.0.0.0"}, r"master_addr: expected the address by which other hosts reach this one"),
    ],
)
def test_hosts_that_cannot_share_the_workers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_config("tiny", **settings)


def test_where_workers_are() -> None:
    config = engine_config(
        "tiny",
        nnodes=2,
        node_key_file="/keys",
        tensor_parallel_size=2,
        data_parallel_size=3,
        speculative_config={"method": "draft_model", "model": "tiny-draft", "placement": "worker"},
    )
    assert [node_of(config, rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [config.crosses_nodes(rank) for rank in range(6)] == [False, False, True, True, False, False]
    assert [device_index(config, rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    drafts = draft_ranks(config)
    assert [(node_of(config, rank), device_index(config, rank)) for rank in drafts] == [(0, 0), (0, 2), (1, 1)]
    placed = [worker_config(config, rank, 1).stage_crosses_nodes for rank in range(6)]
    assert placed == [False, False, True, True, False, False]
    assert worker_config(config, 6, 1).nnodes == 1


LWS = {"LWS_LEADER_ADDRESS": "leader.example", "LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "2"}
TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (LWS, {"nnodes": 3, "node_rank": 2, "master_addr": "leader.example"}),
        (LWS | TORCHRUN, {"nnodes": 3, "node_rank": 2, "master_addr": "leader.example"}),
        (TORCHRUN, {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 29400}),
        # torchrun's own store has the port
        (
            TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"},
        ),
        ({"MASTER_ADDR": "10.0.0.1"}, {}),
    ],
)
def test_environments_of_launchers(environment: dict[str, str], expected: dict[str, object]) -> None:
    assert nodes_of_environment(environment).settings == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE: expected 1, found 8: one command a host"),
        (TORCHRUN | {"RANK": "first"}, "RANK: expected a number, found 'first'"),
        (LWS | {"LWS_GROUP_SIZE": "-1"}, "LWS_GROUP_SIZE: expected a number, found '-1'"),
    ],
)
def test_environments_that_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nodes_of_environment(environment)


def test_settings_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LWS.items():
        monkeypatch.setenv(name, value)
    assert _nodes_of_launcher({"port": 1})["headless"] is True
    assert _nodes_of_launcher({"nnodes": 1}) == {}
    monkeypatch.setenv("LWS_WORKER_INDEX", "0")
    assert "headless" not in _nodes_of_launcher({})
    monkeypatch.setenv("LWS_GROUP_SIZE", "1")
    assert _nodes_of_launcher({}) == {}


def test_a_given_port_goes_with_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, str(value))
    found = _nodes_of_launcher({"master_port": 7})
    assert found == {"headless": True, "nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"}


def test_addresses() -> None:
    assert tcp_endpoint("10.0.0.1", 5) == "tcp://10.0.0.1:5"
    assert tcp_endpoint("::1", "*") == "tcp://[::1]:*"
    assert own_address("127.0.0.1") == "127.0.0.1"
