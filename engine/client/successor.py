"""A planned successor of a running engine: which of the two runs alone, and whether memory holds both.

start-first  the successor starts while the engine computes on, which then ends; needs memory for both
stop-first   the engine ends, then the successor starts; requests wait meanwhile
"""

from __future__ import annotations

from typing import Literal

from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import EngineReady

RestartOrder = Literal["auto", "start-first", "stop-first"]

_OF_MEMORY = "kv_cache_memory_bytes"


def check_room(former: EngineReady, ready: EngineReady) -> None:
    """Raise ConfigError if the successor has a smaller KV cache, since it has started beside the former engine."""
    if ready.num_blocks < former.num_blocks:
        raise ConfigError(
            f"{_OF_MEMORY}: expected {former.num_blocks} blocks, as before, found memory for {ready.num_blocks} beside "
            "the running engine. Set the size, or stop the engine first (stop-first).",
            parameter=_OF_MEMORY,
        )


def resolved_order(order: RestartOrder, config: EngineConfig, ready: EngineReady) -> RestartOrder:
    """Return the order of a replacement: auto becomes stop-first where the two engines cannot run at the same time,
    and stays otherwise. Raises ConfigError for start-first where one address is for both, and with several hosts."""
    if config.nnodes > 1:
        raise ConfigError(
            f"nnodes: expected 1, found {config.nnodes}: an engine on several hosts cannot be replaced while it runs.",
            parameter="nnodes",
        )
    events = config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        if order == "start-first":
            raise ConfigError(
                "restart_order: expected 'stop-first', found 'start-first': both engines would publish at the address "
                "of kv_events_config.",
                parameter="restart_order",
            )
        return "stop-first"
    # the fingerprint of a CPU names no device; a GPU's memory is all in use
    return "stop-first" if order == "auto" and "device" in ready.fingerprint else order


def lacks_memory(error: ConfigError) -> bool:
    """Whether a successor was refused for want of memory."""
    return error.parameter == _OF_MEMORY
