"""One replacement at a time, in an order that both engines bear; tests/server has it with streams."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from msgspec.structs import replace

from sempre.engine.client.engine_process import check_alike
from sempre.engine.client.successor import RestartOrder, check_room, lacks_memory, resolved_order
from sempre.engine.server.rolling_restart import RollingRestart
from sempre.ipc.config import EngineConfig, KVEventsConfig
from sempre.ipc.errors import ConfigError, CoordinatorDied, StartupError
from sempre.ipc.messages import EngineReady

READY = EngineReady(
    vocab_size=100, max_model_len=64, eos_token_ids=[1], num_blocks=8, block_size=16, world_size=1, fingerprint={}
)


def test_signals_replace_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    orders: list[RestartOrder] = []

    async def fake(order: RestartOrder) -> None:
        orders.append(order)
        await asyncio.sleep(0.05)
        if len(orders) == 2:
            raise StartupError("no room")

    async def run() -> None:
        restart = RollingRestart(fake, "stop-first")
        restart.watch()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.sleep(0.1)
        await restart.close()

    with caplog.at_level("INFO"):
        asyncio.run(run())
    assert orders == ["stop-first", "stop-first"]
    text = caplog.text
    assert text.count("is ignored") == 2
    assert "the engine was replaced after" in text
    assert "the engine was not replaced: no room" in text


def test_what_cannot_run_twice_stops_first() -> None:
    config = EngineConfig(model="m", model_path="m")
    gpu = replace(READY, fingerprint={"device": "a GPU"})
    events = replace(config, kv_events_config=KVEventsConfig(enable_kv_cache_events=True))
    assert resolved_order("auto", config, READY) == "auto"
    assert resolved_order("auto", config, gpu) == "stop-first"
    assert resolved_order("start-first", config, gpu) == "start-first"
    assert resolved_order("auto", events, READY) == "stop-first"
    with pytest.raises(ConfigError, match="kv_events_config"):
        resolved_order("start-first", events, READY)
    with pytest.raises(ConfigError, match="several hosts"):
        resolved_order("stop-first", replace(config, nnodes=2), READY)


def test_a_successor_has_the_same_bits_and_no_less_memory() -> None:
    check_alike(READY, replace(READY, num_blocks=4))
    with pytest.raises(CoordinatorDied, match="differs in fingerprint"):
        check_alike(READY, replace(READY, fingerprint={"weights": "x"}))
    check_room(READY, replace(READY, num_blocks=9))
    with pytest.raises(ConfigError, match="expected 8 blocks, as before, found memory for 7") as caught:
        check_room(READY, replace(READY, num_blocks=7))
    assert lacks_memory(caught.value)
