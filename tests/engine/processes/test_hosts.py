"""Hosts of the harness: each reaches the others by its own address, can be cut off, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from sempre.engine.harness import make_hosts
from sempre.engine.harness.hosts import LoopbackHosts, NamespaceHosts

LISTEN = "import socket; s = socket.create_server(('{}', 7)); print('up', flush=True); [s.accept() for _ in range(2)]"
CONNECT = "import socket; print(socket.create_connection(('{}', 7), 1).getsockname()[0])"
NAMESPACES = Path("/var/run/netns")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@needs_root
def test_hosts_in_namespaces() -> None:
    with make_hosts(3) as hosts:
        assert isinstance(hosts, NamespaceHosts)
        names = [name for name in os.listdir(NAMESPACES) if f"-{os.getpid()}-" in name]
        assert len(names) == 4
        listener = subprocess.Popen(
            hosts.command(1, python(LISTEN.format(hosts.addresses[1]))), stdout=subprocess.PIPE, text=True
        )
        with listener, ExitStack() as at_the_end:
            at_the_end.callback(listener.kill)
            assert listener.stdout is not None
            assert listener.stdout.readline() == "up\n"
            ask = hosts.command(0, python(CONNECT.format(hosts.addresses[1])))
            assert subprocess.check_output(ask, text=True).strip() == hosts.addresses[0]
            hosts.cut_off(1)
            assert subprocess.run(ask, capture_output=True, check=False).returncode == 1
            hosts.reconnect(1)
            assert subprocess.check_output(ask, text=True).strip() == hosts.addresses[0]
    assert not [name for name in os.listdir(NAMESPACES) if f"-{os.getpid()}-" in name]


@needs_root
def test_root_that_cannot_have_namespaces_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_hosts(1), pytest.raises(OSError, match=r"ip netns add sempre-.*: .*File exists"):
        make_hosts(1)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="ip: not found; install iproute2"):
        make_hosts(1)


def test_without_root_the_loopback_is_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with make_hosts(2) as hosts:
        assert isinstance(hosts, LoopbackHosts)
        assert "addresses of the loopback" in caplog.text
        assert hosts.command(1, ["x"]) == ["x"]
        assert len(set(hosts.addresses)) == 2
        with pytest.raises(OSError, match=r"127.83.0.2\) is an address of the loopback"):
            hosts.cut_off(1)
    for count in (0, 201):
        with pytest.raises(ValueError, match="expected 1 to 200 hosts"):
            make_hosts(count)
