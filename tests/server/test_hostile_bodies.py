"""What a body may ask of a real server: whatever it is, nobody else waits for it and memory stays free.

The event loop's work is counted in processor time, and waiting for a processor is left out of what a call took, so the
load of the machine is not in what is compared. `tests/support/canary.py --bodies` prints the figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hostile_bodies
import httpx2
import pytest
from canary import Canary
from server_process import ServerProcess

KEY = "a-key"
FLAGS = ("--num-threads", "1", "--trust-request-chat-template", "--api-key", KEY)
HEADERS = {"Authorization": f"Bearer {KEY}"}
CALLS = 40
CHOSEN = (
    "prompt of objects, 4 MB",
    "prompt of objects, as many as pass",
    "49,000 empty messages",
    "a bad word of 7 MB",
    "logit_bias of 90,000 keys",
    "detokenize 130,000 ids",
    "240,000 token ids",
    "a prompt of 130 KB without spaces",
    "30 prompts of 200 tokens",
    "10⁵ allowed ids for 128 answers",
    "a wide string of 8 MB",
    "log-probabilities of a chat",
    "8 long prompts",
    "a long prompt, scored",
    "a schema of 4,000 properties",
    "a schema that recurs",
    "a schema of nested choices",
    "an expression of many states",
    "nested arguments",
    "messages: 24,000 blocks",
    "responses: 16,000 items",
    "template: a wide number",
    "template: a long string",
    "template: indented",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    support = str(Path(hostile_bodies.__file__).parent)
    with ServerProcess(
        tmp_path_factory.mktemp("server") / "log",
        *FLAGS,
        "--middleware",
        "busy_middleware.Busy",
        headers=HEADERS,
        environment={"PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def canary(server: ServerProcess) -> Canary:
    return Canary(server.port, server.process.pid, key=KEY, calls=CALLS)


def problems(server: ServerProcess, canary: Canary, name: str, key: str) -> list[str]:
    sent = []
    reading = canary.during(lambda: sent.append(hostile_bodies.attack(name, key, times=1)(server.port)))
    assert server.process.poll() is None
    return reading.problems(canary.baseline, sent[0])


@pytest.mark.parametrize("name", CHOSEN)
def test_nobody_else_notices(server: ServerProcess, canary: Canary, name: str) -> None:
    assert problems(server, canary, name, KEY) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", hostile_bodies.BODIES)
def test_nobody_else_notices_any(server: ServerProcess, canary: Canary, name: str) -> None:
    assert problems(server, canary, name, KEY) == []


@pytest.mark.parametrize("name", ["prompt of objects, 4 MB", "template: a wide number"])
def test_without_a_key_nothing_is_read(server: ServerProcess, canary: Canary, name: str) -> None:
    assert problems(server, canary, name, "") == []
    assert hostile_bodies.ANSWERS[name][0] in (0, 401)


def test_the_canary_notices_a_busy_event_loop(server: ServerProcess, canary: Canary) -> None:
    """The control."""
    reading = canary.during(lambda: httpx2.get(f"{server.url}/version", headers=HEADERS, timeout=60))
    assert any("the event loop worked" in problem for problem in reading.problems(canary.baseline))
