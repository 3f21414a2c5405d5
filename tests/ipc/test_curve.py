"""Links between hosts: who has no key, or another one, gets nothing and harms nothing."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from rank_links import keys_of, linked, shared_gate

from sempre.ipc.curve import HEAD, ClientKeys, Gate, make_key_file, read_key_file
from sempre.ipc.errors import ConfigError, EngineUnhealthy, ProtocolError, StartupError
from sempre.ipc.key_pairs import KeyPair
from sempre.ipc.rank_links import RankLinks

SHORT_S = 0.3


@pytest.fixture
def gate() -> Gate:
    return shared_gate()


# Key files


def test_a_key_file_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    assert make_key_file(path)
    secret = read_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not make_key_file(path)
    assert read_key_file(path) == secret
    assert os.listdir(tmp_path) == ["keys"]


def test_keys_follow_from_the_secret_and_the_owner(tmp_path: Path) -> None:
    pairs = [KeyPair.derived(secret, owner) for secret in (b"a" * 32, b"b" * 32) for owner in (HEAD, "node 1")]
    assert len({pair.public for pair in pairs}) == len({pair.secret for pair in pairs}) == 4
    assert KeyPair.derived(b"a" * 32, HEAD) == pairs[0]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    make_key_file(path)
    path.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"node_key_file: .*keys: .* found mode {mode:04o}; run chmod 600"
    ) as refused:
        read_key_file(path)
    assert refused.value.parameter == "node_key_file"


@pytest.mark.parametrize("text", [b"", b"ab", b"0" * 63, b"0" * 65, b"Z" * 64, b"0" * 64 + b"\n\n", os.urandom(4096)])
def test_a_file_that_holds_no_secret_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="expected 64 hexadecimal digits"):
        read_key_file(path)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node_key_file: .*nowhere/keys: cannot be written: No such file"):
        make_key_file(tmp_path / "nowhere" / "keys")


# Links of ranks


def test_frames_arrive_in_order_from_each_rank() -> None:
    with linked(3, first=4) as links:
        for number in range(300):
            links[0].send(6, [b"from 4", str(number).encode() * number])
            links[1].send(6, [memoryview(str(number).encode())])
        for number in range(300):
            assert links[2].receive(4, 5.0) == [b"from 4", str(number).encode() * number]
        for number in range(300):
            assert links[2].receive(5, 5.0) == [str(number).encode()]
        assert not links[2].has_frame(4, 0.01)


def test_a_rank_that_sends_nothing_is_named() -> None:
    with (
        linked(2) as links,
        pytest.raises(EngineUnhealthy, match=r"rank 0: expected rank 1 to send within 0\.3 s") as e,
    ):
        links[0].receive(1, SHORT_S)
    assert e.value.rank == 1


def test_addresses_of_all_ranks_are_needed(gate: Gate) -> None:
    links = RankLinks(1, "127.0.0.1", keys_of(3)[1], gate)
    try:
        with pytest.raises(StartupError, match=r"rank 1: expected addresses of ranks \[0, 2\], found those of \[0\]"):
            links.connect({0: "tcp://127.0.0.1:9", 1: links.address})
    finally:
        links.close()


def _intruder(address: str, keys: ClientKeys | None) -> zmq.Socket[bytes]:
    intruder: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    intruder.linger = 0
    if keys is not None:
        keys.secure(intruder)
    intruder.connect(address)
    return intruder


def test_peers_without_the_right_key_are_not_heard(gate: Gate) -> None:
    """No key, a key that nobody allows, the wrong key of the server; the control is the right one."""
    keys = keys_of(2)
    links = RankLinks(0, "127.0.0.1", keys[0], gate)
    public = keys[0].own.public
    right = ClientKeys(keys[1].own, public)
    others = [None, ClientKeys(KeyPair.new(), public), ClientKeys(keys[1].own, KeyPair.new().public)]
    intruders = [_intruder(links.address, other) for other in others]
    try:
        for intruder in intruders:
            # one that was refused already has nowhere to send to
            with suppress(zmq.Again):
                intruder.send_multipart([(1).to_bytes(8, "little"), b"forged"], zmq.DONTWAIT)
        assert not links.has_frame(1, SHORT_S)
        intruders.append(_intruder(links.address, right))
        intruders[-1].send_multipart([(1).to_bytes(8, "little"), b"real"])
        assert links.receive(1, 5.0) == [b"real"]
    finally:
        for intruder in intruders:
            intruder.close()
        links.close()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([2], "expected frame 1 of rank 1, found 2"),
        ([1, 1], "expected frame 2 of rank 1, found 1"),
        ([1, 3], "expected frame 2 of rank 1, found 3"),
    ],
    ids=["the first is lost", "repeated", "lost"],
)
def test_lost_and_repeated_frames_are_named(numbers: list[int], message: str, gate: Gate) -> None:
    keys = keys_of(2)
    links = RankLinks(0, "127.0.0.1", keys[0], gate)
    peer = _intruder(links.address, ClientKeys(keys[1].own, keys[0].own.public))
    try:
        for number in numbers:
            peer.send_multipart([number.to_bytes(8, "little"), b"x"])
        for _ in numbers[:-1]:
            links.receive(1, 5.0)
        with pytest.raises(ProtocolError, match=f"rank 0: {message}"):
            links.receive(1, 5.0)
    finally:
        peer.close()
        links.close()


def test_garbage_and_floods_harm_nobody() -> None:
    with linked(2) as links:
        host, port = links[0].address.removeprefix("tcp://").split(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(50)]
        for stranger in strangers:
            stranger.sendall(os.urandom(20_000) if stranger is not strangers[0] else b"GET / HTTP/1.1\r\n\r\n")
        links[1].send(0, [b"heard"])
        assert links[0].receive(1, 5.0) == [b"heard"]
        for stranger in strangers:
            stranger.close()
