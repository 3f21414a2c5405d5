"""Frames that are delayed, repeated, lost or corrupted on a link: harmless, or a clear error, never a hang."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sempre.engine.harness import Cluster, Fault, FaultProxy
from sempre.engine.harness.faults import Direction
from sempre.ipc.errors import FrameLost, MessageMalformed, ProtocolError, StartupError, WorkerDied
from sempre.ipc.messages import RequestSpec

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]
INTERVAL_S = 0.1
WORKER_FRAMES: list[tuple[Direction, str]] = [("down", "ExecuteStep"), ("up", "StepResult"), ("up", "Heartbeat")]
CLIENT_FRAMES: list[tuple[Direction, str]] = [("up", "AddRequests"), ("down", "OutputsReady")]


def struck(proxy: FaultProxy | None) -> list[str]:
    assert proxy is not None
    return [fault.action for fault in proxy.struck()]


@pytest.mark.parametrize("action", ["delay", "duplicate"])
def test_delayed_and_repeated_frames_are_harmless(start: Start, requests: Requests, action: str) -> None:
    """A fault for each kind of frame of both links, all on one engine; the results are those of an unharmed one."""
    cluster = start(worker_faults=[], client_faults=[], heartbeat_interval_s=INTERVAL_S)
    expected = cluster.generate(requests(4))
    faults = [
        (proxy, Fault(action, direction, message, nth=2 if message != "AddRequests" else 1, delay_s=0.1))  # type: ignore[arg-type]
        for proxy, frames in ((cluster.worker_proxy, WORKER_FRAMES), (cluster.client_proxy, CLIENT_FRAMES))
        for direction, message in frames
    ]
    for proxy, fault in faults:
        assert proxy is not None
        proxy.inject(fault)
    assert cluster.generate(requests(4)) == expected
    assert set(struck(cluster.client_proxy)) == {action}
    assert struck(cluster.worker_proxy).count(action) >= 2
    assert cluster.generate(requests(4)) == expected


@pytest.mark.parametrize("action", ["drop", "corrupt"])
@pytest.mark.parametrize(("direction", "message"), WORKER_FRAMES)
def test_a_lost_or_corrupt_frame_on_the_worker_s_link(
    start: Start, requests: Requests, action: str, direction: Direction, message: str
) -> None:
    cluster = start(worker_faults=[], max_restarts=0, heartbeat_interval_s=INTERVAL_S)
    assert cluster.worker_proxy is not None
    cluster.call("slow", 0.02)
    cluster.worker_proxy.inject(Fault(action, direction, message))  # type: ignore[arg-type]
    with pytest.raises(WorkerDied, match=r"sequence|checksum") as death:
        cluster.generate(requests(4, max_tokens=1000), timeout_s=20)
    assert death.value.rank == 0
    assert struck(cluster.worker_proxy) == [action]


@pytest.mark.parametrize(("action", "error"), [("drop", FrameLost), ("corrupt", MessageMalformed)])
@pytest.mark.parametrize(("direction", "message"), CLIENT_FRAMES)
def test_a_lost_or_corrupt_frame_on_the_client_s_link(
    start: Start, requests: Requests, action: str, error: type[ProtocolError], direction: Direction, message: str
) -> None:
    """The call fails; the engine does not, and serves the next one."""
    cluster = start(client_faults=[], heartbeat_interval_s=INTERVAL_S)
    assert cluster.client_proxy is not None
    expected = cluster.generate(requests(2))
    cluster.client_proxy.inject(Fault(action, direction, message))  # type: ignore[arg-type]
    with pytest.raises(error):
        cluster.generate(requests(2, first=20), timeout_s=20)
    assert struck(cluster.client_proxy) == [action]
    assert cluster.generate(requests(2)) == expected


@pytest.mark.parametrize("message", ["WorkerHello", "ModelLoaded"])
def test_a_lost_frame_stops_the_start(start: Start, message: str) -> None:
    with pytest.raises(StartupError, match="expected"):
        start(worker_faults=[Fault("drop", "up", message)], heartbeat_interval_s=INTERVAL_S)
