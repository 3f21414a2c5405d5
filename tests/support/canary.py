"""What a well-behaved client feels, and what memory a server takes, while another client misbehaves.

The canary is a process of its own, so that a hostile client written in Python cannot slow it down. Its calls are
`/health` on a new connection each and one token of a completion on a kept one, in turn. Two clocks run for each call:
the wall's, which also shows the load of the machine, and the processor time of the server's event loop, which does not.

    python tests/support/canary.py [NAME …]     every attack of hostile_clients.py, or those named, as a table
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

CALLS = 200
# what a stranger may add to the slowest call, and take in memory beyond what he sent
ALLOWED_S = 0.1
ALLOWED_BYTES = 64 * 2**20
# a call may also wait for its turn on a machine that does other things; what is stuck waits much longer
ALLOWED_WAIT_S = 3.0
_LONGEST_S = 60.0
_LOOK_S = 0.01
_WARM_CALLS = 20

_HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n%sConnection: close\r\n\r\n"
_COMPLETION = json.dumps({"prompt": "It is a truth", "max_tokens": 1, "seed": 1}).encode()


@dataclass(frozen=True)
class Reading:
    """What the canary met; seconds are those of the slowest call, bytes the peak beyond what was in use before."""

    calls: int
    slowest_s: float
    busiest_s: float
    """processor time of the server's event loop within one call"""
    memory_bytes: int
    failures: tuple[str, ...]

    def problems(self, baseline: Reading, body_bytes: int = 0) -> list[str]:
        """Return what is beyond the bounds; `body_bytes` is what the hostile client sent that may be held."""
        found = list(self.failures[:3])
        if self.busiest_s > baseline.busiest_s + ALLOWED_S:
            found.append(f"the event loop worked {self.busiest_s:.3f} s in one call, {baseline.busiest_s:.3f} s before")
        if self.slowest_s > baseline.slowest_s + ALLOWED_WAIT_S:
            found.append(f"a call took {self.slowest_s:.3f} s, {baseline.slowest_s:.3f} s before")
        if self.memory_bytes > body_bytes + ALLOWED_BYTES:
            found.append(f"{self.memory_bytes / 2**20:.0f} MiB beyond what was in use, {body_bytes / 2**20:.0f} sent")
        return found


class Canary:
    """Measures one server, first undisturbed (`baseline`), then beside attacks."""

    def __init__(self, port: int, pid: int, *, key: str = "", calls: int = CALLS) -> None:
        self._port, self._pid, self._key, self._calls = port, pid, key, calls
        self._read(lambda: None, _WARM_CALLS)
        self.baseline = self._read(lambda: None, calls)

    def during(self, attack: Callable[[], object]) -> Reading:
        """Run `attack` beside the canary's calls, which last until both the attack and their number are done."""
        return self._read(attack, self._calls)

    def _read(self, attack: Callable[[], object], calls: int) -> Reading:
        settings = {"port": self._port, "pid": self._pid, "key": self._key, "calls": calls}
        command = [sys.executable, __file__, "--probe", json.dumps(settings)]
        with _Memory(self._pid) as memory:
            probe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert probe.stdin is not None
            assert probe.stdout is not None
            try:
                assert probe.stdout.readline() == b"calling\n"
                attack()
            finally:
                probe.stdin.close()
                told = probe.stdout.read()
                probe.wait()
        found = json.loads(told)
        failures = tuple(found.pop("failures"))
        return Reading(memory_bytes=memory.peak_bytes, failures=failures, **found)


class _Memory:
    """The peak of the resident memory of a process and its descendants, beyond what it was at the start."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._sampled = 0

    def __enter__(self) -> _Memory:
        self._before = {member: _status(member, "VmRSS") for member in self._family()}
        for member in self._before:
            Path(f"/proc/{member}/clear_refs").write_text("5")  # the high-water mark begins anew
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watching.join()
        grown = sum(max(0, _status(member, "VmHWM") - before) for member, before in self._before.items())
        self.peak_bytes = max(grown, self._sampled - sum(self._before.values()))

    def _watch(self) -> None:
        family = self._family()
        looks = 0
        while not self._over.wait(_LOOK_S):
            looks += 1
            if looks % 10 == 0:
                family = self._family()
            self._sampled = max(self._sampled, sum(_status(member, "VmRSS") for member in family))

    def _family(self) -> list[int]:
        return [self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))]


def _status(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class _Probe:
    """The process that calls."""

    def __init__(self, port: int, pid: int, key: str) -> None:
        self._address = ("127.0.0.1", port)
        self._clock = f"/proc/{pid}/task/{pid}/stat"
        self._authorization = f"Authorization: Bearer {key}\r\n".encode() if key else b""
        self._kept: socket.socket | None = None

    def call(self, number: int) -> tuple[float, float, str]:
        """Return the seconds on the wall and of the server's event loop, and what went wrong."""
        began, worked = time.monotonic(), self._loop_s()
        problem = ""
        try:
            status = self._complete() if number % 2 else self._health()
            if status != b"200":
                problem = f"a call was answered with {status!r}"
        except OSError as error:
            problem = f"a call failed after {time.monotonic() - began:.1f} s: {error!r}"
            self._kept = None
        return time.monotonic() - began, self._loop_s() - worked, problem

    def _loop_s(self) -> float:
        with open(self._clock, encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _health(self) -> bytes:
        with socket.create_connection(self._address, _LONGEST_S) as connection:
            connection.sendall(_HEALTH % self._authorization)
            return self._status(connection)

    def _complete(self) -> bytes:
        # A server may close a connection that was idle, or that had its number of requests.
        if self._kept is None:
            self._kept = socket.create_connection(self._address, _LONGEST_S)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += self._authorization + b"Content-Length: %d\r\n\r\n" % len(_COMPLETION)
        self._kept.sendall(head + _COMPLETION)
        return self._status(self._kept)

    @staticmethod
    def _status(connection: socket.socket) -> bytes:
        """Read one answer whole and return its status."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += _more(connection)
        head, _, body = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        missing = int(fields.get(b"content-length", b"0")) - len(body)
        while missing > 0:
            missing -= len(_more(connection))
        return head.split()[1]


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def _probe(port: int, pid: int, key: str, calls: int) -> None:
    probe = _Probe(port, pid, key)
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    made = [probe.call(0)]
    print("calling", flush=True)
    while len(made) < calls or not over.is_set():
        made.append(probe.call(len(made)))
    walls, loops, problems = zip(*made, strict=True)
    told = {"calls": len(made), "slowest_s": max(walls), "busiest_s": max(loops)}
    print(json.dumps({**told, "failures": [problem for problem in problems if problem]}))


def measure(attacks: Mapping[str, Callable[[int], int]], *flags: str) -> int:
    """Print a table of `attacks` on a server of their own; each takes a port and returns the bytes it sent at most.

    Return the number of attacks that were beyond the bounds.
    """
    from server_process import ServerProcess

    beyond = 0
    print(f"{'attack':40} {'calls':>6} {'slowest':>9} {'loop':>8} {'memory':>9}")
    with TemporaryDirectory() as folder, ServerProcess(Path(folder) / "log", *flags) as server:
        for name, attack in attacks.items():
            sent = [0]
            canary = Canary(server.port, server.process.pid)
            reading = canary.during(lambda attack=attack, sent=sent: sent.append(attack(server.port)))  # type: ignore[misc]
            problems = reading.problems(canary.baseline, max(sent))
            beyond += bool(problems)
            for label, row in (("  before", canary.baseline), (name, reading)):
                memory = f"{row.memory_bytes / 2**20:5.0f} MiB"
                print(f"{label:40} {row.calls:6} {row.slowest_s:7.3f} s {row.busiest_s:6.2f} s {memory}")
            for problem in problems:
                print(f"    beyond: {problem}")
            sys.stdout.flush()
    return beyond


def main() -> int:
    """The probe's own process, or the table."""
    if sys.argv[1:2] == ["--probe"]:
        _probe(**json.loads(sys.argv[2]))
        return 0
    from hostile_clients import ATTACKS

    chosen = {name: ATTACKS[name] for name in sys.argv[1:] or ATTACKS}
    return measure(chosen, "--max-num-seqs", "8", "--num-threads", "1")


if __name__ == "__main__":
    sys.exit(main())
