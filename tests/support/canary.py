"""What a well-behaved client feels, and what memory a server takes, while another client misbehaves.

The canary is a separate process, so that a hostile client written in Python cannot slow it down. Its calls are
`/health` on a new connection each and, beside them, one token of a completion on a kept one. Three clocks run for each
call: the wall's, which also shows the load of the machine; the wall's without what the server's event loop, the
coordinator and the workers waited for a processor; and the processor time of the event loop. The last one counts for
`/health` alone: a completion may also wait for a place in a step, while the event loop serves those who have one.

    python tests/support/canary.py [NAME …]     every attack of hostile_clients.py, or those named, as a table
    python tests/support/canary.py --bodies [NAME …]        the same of hostile_bodies.py
    python tests/support/canary.py --bodies --keys [NAME …] with a key, and without it
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

CALLS = 200
# what a stranger may add to the slowest call, and take in memory beyond what it sent
ALLOWED_S = 0.1
ALLOWED_BYTES = 64 * 2**20
# a call may also wait for its turn on a machine that does other things; what is stuck waits much longer
ALLOWED_WAIT_S = 3.0
_LONGEST_S = 60.0
_LOOK_S = 0.01
_WARM_CALLS = 20
_TRIES = 3

_HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n%sConnection: close\r\n\r\n"
_COMPLETION = json.dumps({"prompt": "It is a truth", "max_tokens": 1, "seed": 1}).encode()


@dataclass(frozen=True)
class Reading:
    """What the canary measured; seconds of the slowest call, bytes at the peak beyond what was in use before."""

    calls: int
    slowest_s: float
    stuck_s: float
    """of the slowest call without what it waited for a processor"""
    busiest_s: float
    """processor time of the server's event loop within one call of `/health`"""
    memory_bytes: int
    failures: tuple[str, ...]

    def problems(self, baseline: Reading, body_bytes: int = 0, allowed_wait_s: float = ALLOWED_WAIT_S) -> list[str]:
        """Return what is beyond the bounds; `body_bytes` is what the hostile client sent that may be held."""
        found = list(self.failures[:3])
        if self.busiest_s > baseline.busiest_s + ALLOWED_S:
            found.append(f"the event loop worked {self.busiest_s:.3f} s in one call, {baseline.busiest_s:.3f} s before")
        if self.stuck_s > baseline.stuck_s + allowed_wait_s:
            found.append(f"a call took {self.stuck_s:.3f} s, {baseline.stuck_s:.3f} s before")
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
        settings = {"port": self._port, "key": self._key, "calls": calls, "clocks": _clocks(self._pid)}
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
            Path(f"/proc/{member}/clear_refs").write_text("5")  # reset the high-water mark
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


def _clocks(pid: int) -> list[str]:
    """The files that tell of each thread that a call may wait for: nanoseconds of work, and of waiting for a processor.

    The first is the event loop's. Helper processes are left out, as nobody waits for those of others.
    """
    threads = [(pid, pid)]
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if not any("helper_process" in word for word in child.cmdline()):
                threads += [(child.pid, thread.id) for thread in child.threads()]
    return [f"/proc/{process}/task/{thread}/schedstat" for process, thread in threads]


def _status(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class Call(NamedTuple):
    """Seconds of one call, and what went wrong."""

    slowest_s: float
    stuck_s: float
    busiest_s: float
    problem: str


class _Probe:
    """The process that calls."""

    def __init__(self, port: int, key: str, clocks: list[str]) -> None:
        self._address = ("127.0.0.1", port)
        self._clocks = [*clocks, "/proc/self/schedstat"]
        self._authorization = f"Authorization: Bearer {key}\r\n".encode() if key else b""
        self._kept: socket.socket | None = None

    def health(self) -> Call:
        """Make a call of `/health`."""
        return self._timed(self._health)

    def completion(self) -> Call:
        """Make a call for one token."""
        return self._timed(self._complete)._replace(busiest_s=0.0)

    def _timed(self, call: Callable[[], bytes]) -> Call:
        (worked, waited), began = self._clock_s(), time.monotonic()
        problem = ""
        try:
            status = call()
            if status != b"200":
                problem = f"a call was answered with {status!r}"
        except OSError as error:
            problem = f"a call failed after {time.monotonic() - began:.1f} s: {error!r}"
            if call == self._complete:
                self._kept = None
        wall = time.monotonic() - began
        now_worked, now_waited = self._clock_s()
        return Call(wall, max(0.0, wall - (now_waited - waited)), now_worked - worked, problem)

    def _clock_s(self) -> tuple[float, float]:
        """Seconds that the event loop has worked, and that all have waited for a processor."""
        worked, waited = 0, 0
        for place, path in enumerate(self._clocks):
            with suppress(FileNotFoundError, ProcessLookupError), open(path, encoding="ascii") as file:
                fields = file.read().split()
                worked += int(fields[0]) if place == 0 else 0
                waited += int(fields[1])
        return worked / 1e9, waited / 1e9

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


def _probe(port: int, key: str, calls: int, clocks: list[str]) -> None:
    probe = _Probe(port, key, clocks)
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    made = [probe.health()]
    print("calling", flush=True)

    def repeat(call: Callable[[], Call]) -> None:
        for number in count(1):
            made.append(call())
            if 2 * number >= calls and over.is_set():
                return

    threads = [threading.Thread(target=repeat, args=(call,)) for call in (probe.health, probe.completion)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    most = {name: max(getattr(call, name) for call in made) for name in Call._fields if name != "problem"}
    problems = [call.problem for call in made if call.problem]
    print(json.dumps({"calls": len(made), **most, "failures": problems}))


def measure(attacks: Mapping[str, Callable[[int], int]], *flags: str, key: str = "") -> int:
    """Print a table of `attacks` on a server of their own; each takes a port and returns the bytes it sent at most.

    What is beyond the bounds is tried again, since other programs run as well. Return how many stay beyond them.
    """
    from server_process import ServerProcess

    beyond = 0
    print(f"{'attack':40} {'calls':>6} {'slowest':>9} {'stuck':>9} {'loop':>9} {'memory':>9}")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with TemporaryDirectory() as folder, ServerProcess(Path(folder) / "log", *flags, headers=headers) as server:
        for name, attack in attacks.items():
            sent = [0]
            for _ in range(_TRIES):
                canary = Canary(server.port, server.process.pid, key=key)
                reading = canary.during(lambda attack=attack, sent=sent: sent.append(attack(server.port)))  # type: ignore[misc]
                problems = reading.problems(canary.baseline, max(sent), ALLOWED_S)
                if not problems:
                    break
            beyond += bool(problems)
            for label, row in (("  before", canary.baseline), (name, reading)):
                memory = f"{row.memory_bytes / 2**20:5.0f} MiB"
                seconds = " ".join(f"{each:7.3f} s" for each in (row.slowest_s, row.stuck_s, row.busiest_s))
                print(f"{label:40} {row.calls:6} {seconds} {memory}")
            for problem in problems:
                print(f"    beyond: {problem}")
            sys.stdout.flush()
    return beyond


def main() -> int:
    """The probe's own process, or the table."""
    if sys.argv[1:2] == ["--probe"]:
        _probe(**json.loads(sys.argv[2]))
        return 0
    import hostile_bodies
    import hostile_clients

    options, names = ([word for word in sys.argv[1:] if word.startswith("--") is flag] for flag in (True, False))
    if "--bodies" not in options:
        clients = hostile_clients.ATTACKS
        return measure({name: clients[name] for name in names or clients}, "--max-num-seqs", "8", "--num-threads", "1")
    key = "a-key" if "--keys" in options else ""
    bodies = hostile_bodies.attacks(key)
    if key:
        bodies |= {f"no key: {name}": attack for name, attack in hostile_bodies.attacks("").items()}
    flags = ["--trust-request-chat-template", "--num-threads", "1", *(["--api-key", key] if key else [])]
    return measure({name: bodies[name] for name in names or bodies}, *flags, key=key)


if __name__ == "__main__":
    sys.exit(main())
