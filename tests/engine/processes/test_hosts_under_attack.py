"""Two hosts in network namespaces, and a third one that attacks every port they listen on for as long as they compute:
the bits are those of one worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sempre.engine.harness import make_hosts
from sempre.engine.harness.hosts import Hosts

SEMPRE = [sys.executable, "-m", "sempre.engine"]
WORK = ["--model", "tiny", "--sampling-seed", "7", "--logprobs", "2", "--json", "--max-tokens", "150"]
PROMPTS = ["The ship", "A long way from the harbour", "Two of them", "It was late"]
PORT = 29501
START_S, ATTACK_S = 90.0, 120.0
LISTENS = "0A"

# In turn and over again: no key, a key that nobody allows, bytes that are no ZMTP, a frame of 1 GB announced, 50
# connections at once that say nothing, and a flood. Prints how many connections of each were made.
ATTACK = """
import json, os, socket, struct, sys, time
import zmq

targets = [tuple(target) for target in json.loads(sys.argv[1])]
greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"CURVE".ljust(20, b"\\0") + bytes(32)
counts = dict.fromkeys(["no key", "wrong key", "garbage", "1 GB", "silent", "flood"], 0)
held = []

def raw(name, target, payload):
    try:
        with socket.create_connection(target, 1) as link:
            counts[name] += 1
            link.settimeout(1)
            link.sendall(payload)
    except OSError:
        pass

def peer(name, target, secure):
    with zmq.Context() as context, context.socket(zmq.DEALER) as link:
        link.linger = 0
        if secure:
            link.curve_publickey, link.curve_secretkey = zmq.curve_keypair()
            link.curve_serverkey = zmq.curve_keypair()[0]
        link.connect("tcp://%s:%d" % target)
        counts[name] += 1
        try:
            link.send(bytes(1 << 16), zmq.DONTWAIT)
        except zmq.Again:
            pass
        time.sleep(0.05)

while os.getppid() == int(sys.argv[2]):
    for target in targets:
        peer("no key", target, False)
        peer("wrong key", target, True)
        raw("garbage", target, os.urandom(1 << 16))
        raw("1 GB", target, greeting + b"\\x06" + struct.pack(">Q", 1 << 30) + bytes(1 << 16))
        raw("flood", target, greeting + (b"\\x04\\x06\\x05ERROR" * 20000))
        while len(held) >= 50:
            held.pop(0).close()
        try:
            held.append(socket.create_connection(target, 1))
            counts["silent"] += 1
        except OSError:
            pass
    print(json.dumps(counts), flush=True)
"""


def listening(hosts: Hosts, host: int) -> set[int]:
    """Ports that other hosts can connect to."""
    table = subprocess.check_output(hosts.command(host, ["cat", "/proc/net/tcp"]), text=True)
    fields = [line.split() for line in table.splitlines()[1:]]
    return {
        int(each[1].split(":")[1], 16) for each in fields if each[3] == LISTENS and not each[1].startswith("0100007F")
    }


def all_listening(hosts: Hosts, engine: subprocess.Popen[str]) -> list[tuple[str, int]]:
    """When host 0 has the port of hosts, that of workers and its rank's, and host 1 its rank's."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert engine.poll() is None, engine.communicate()
        ports = [listening(hosts, host) for host in range(2)]
        if len(ports[0]) >= 3 and ports[1]:
            assert PORT in ports[0]
            return [(hosts.addresses[host], port) for host in range(2) for port in sorted(ports[host])]
        time.sleep(0.05)
    raise AssertionError(f"listening within {START_S:g} s: {ports}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with make_hosts(3) as made:
        yield made


@pytest.mark.product
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_attacks_change_no_bit(hosts: Hosts, tmp_path: Path) -> None:
    alone, other = (
        subprocess.check_output([*SEMPRE, "generate", *WORK, "--numerics-profile", profile, *PROMPTS], text=True)
        for profile in ("tree8", "single")
    )
    layout = [
        "-tp",
        "2",
        "--nnodes",
        "2",
        "--master-addr",
        hosts.addresses[0],
        "--node-key-file",
        str(tmp_path / "keys"),
    ]
    with ExitStack() as at_the_end, (tmp_path / "agent.log").open("w") as log:

        def start(host: int, words: list[str], errors: int | None = None) -> subprocess.Popen[str]:
            process = subprocess.Popen(hosts.command(host, words), stdout=subprocess.PIPE, stderr=errors, text=True)
            at_the_end.enter_context(process)
            at_the_end.callback(process.kill)
            return process

        engine = start(0, [*SEMPRE, "generate", *WORK, *layout, *PROMPTS])
        flags = ["serve", "tiny", "--headless", "--node-rank", "1", *layout]
        agent = start(1, [*SEMPRE, *flags], log.fileno())
        targets = all_listening(hosts, engine)
        attacker = start(2, [sys.executable, "-c", ATTACK, json.dumps(targets), str(os.getpid())])
        found, _ = engine.communicate(timeout=ATTACK_S)
        assert attacker.poll() is None, "attacks go on until the end"
        attacker.kill()
        assert attacker.stdout is not None
        counts = json.loads(attacker.stdout.read().splitlines()[-1])
        assert all(counts.values()), counts
        assert engine.returncode == 0
        assert agent.wait(15.0) == 0
    assert found == alone != other
    assert len(found.splitlines()) >= len(PROMPTS)
