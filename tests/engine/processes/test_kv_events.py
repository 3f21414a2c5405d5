"""A subscriber of a running engine knows what is in its prefix caches, whatever happens to the workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from cache_mirror import CacheMirror, findable_blocks
from light_worker import LightWorker

from sempre.engine.client.inproc import InprocClient
from sempre.engine.coordinator.kv_event_publisher import END
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import Cluster, generate, make_request
from sempre.ipc.config import EngineConfig, KVEventsConfig
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import ResetPrefixCache, ResetPrefixCacheReply

Start = Callable[..., Cluster]
PATIENCE_S = 60.0


def settings(folder: Path) -> dict[str, Any]:
    return {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{folder}/pub",
        "replay_endpoint": f"ipc://{folder}/replay",
    }


class Reader:
    """Mirrors a replica's cache by asking for its batches."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, replica: int) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        self._socket.connect(address)
        self._replica = replica
        self._next = 0
        self.mirror = CacheMirror()

    def read(self) -> CacheMirror:
        """Read all batches so far."""
        self._socket.send_multipart([b"", self._next.to_bytes(8, "big")])
        while True:
            _, number, payload = self._socket.recv_multipart()
            if number == END:
                return self.mirror
            assert int.from_bytes(number, "big") == self._next
            self._next += 1
            assert self.mirror.apply_batch(payload) == self._replica

    def wait_for(self, condition: Callable[[CacheMirror], bool]) -> CacheMirror:
        deadline = time.monotonic() + PATIENCE_S
        while not condition(self.read()):
            assert time.monotonic() < deadline, self.mirror.blocks
            time.sleep(0.02)
        return self.mirror


def test_the_mirror_is_the_cache_of_an_engine(tmp_path: Path) -> None:
    """At the end of every request, among evictions, prefix hits and a reset."""
    config = EngineConfig(
        model="scripted-light",
        model_path="/",
        kv_events_config=KVEventsConfig(**settings(tmp_path)),
        kv_cache_memory_bytes=24,  # blocks, to this worker
    )
    client = InprocClient.launch(config, executor=InprocExecutor(config, LightWorker))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        reader = Reader(context, f"ipc://{tmp_path}/replay", 0)
        scheduler = client._core._replicas[0]._scheduler
        num_removed = 0
        for ordinal in range(30):
            prompt = [*range(40), *range(100 * (ordinal % 20), 100 * (ordinal % 20) + 60)]
            before = {*findable_blocks(scheduler)}
            generate(client, [make_request(prompt, ordinal=ordinal, max_tokens=30)], timeout_s=PATIENCE_S)
            num_removed += len(before - {*findable_blocks(scheduler)})
            expected = findable_blocks(scheduler)
            assert expected
            assert reader.wait_for(lambda mirror, blocks=expected: mirror.blocks == blocks).blocks == expected  # type: ignore[misc]
        assert num_removed > 0, "nothing was evicted"
        client.send(ResetPrefixCache(call_id=1))
        reply = client.receive(PATIENCE_S)
        assert isinstance(reply, ResetPrefixCacheReply)
        assert reply.done
        assert reader.wait_for(lambda mirror: mirror.num_clears == 1).blocks == findable_blocks(scheduler) == {}
    finally:
        context.destroy(linger=0)
        client.close()


def test_each_replica_publishes_its_own_and_clears_it_when_a_worker_dies(start: Start, tmp_path: Path) -> None:
    cluster = start(data_parallel_size=2, kv_events_config=settings(tmp_path))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        readers = [Reader(context, f"ipc://{tmp_path}/replay{suffix}", i) for i, suffix in enumerate(("", "_dp1"))]
        specs = [make_request([100 * i + j for j in range(40)], ordinal=i, max_tokens=4) for i in range(6)]
        cluster.generate(specs)
        heads = {tuple(spec.prompt_token_ids[:16]) for spec in specs}
        deadline = time.monotonic() + PATIENCE_S
        while not heads <= {tokens for reader in readers for tokens in reader.read().blocks.values()}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = [{*reader.mirror.blocks.values()} & heads for reader in readers]
        assert all(found)
        assert not found[0] & found[1]
        cluster.kill(1)
        readers[1].wait_for(lambda mirror: mirror.num_clears == 1 and not mirror.blocks)
        assert readers[0].read().num_clears == 0
    finally:
        context.destroy(linger=0)


def test_an_address_in_use_ends_the_start_with_its_name(start: Start) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        taken = context.socket(zmq.PUB)
        port = taken.bind_to_random_port("tcp://*")
        with pytest.raises(ConfigError, match=rf"kv_events_config\['endpoint'\]: cannot bind tcp://\*:{port}"):
            start(kv_events_config={"enable_kv_cache_events": True, "endpoint": f"tcp://*:{port}"})
    finally:
        context.destroy(linger=0)
