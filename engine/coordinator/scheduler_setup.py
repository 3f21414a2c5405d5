"""The scheduler of a replica, with the limits that the workers have reported."""

from __future__ import annotations

from msgspec.structs import replace

from sempre.engine.coordinator.startup import StartUp
from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.kv_events import KVEvents
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import EngineConfig
from sempre.ipc.messages import EngineReady


def make_scheduler(
    config: EngineConfig,
    startup: StartUp,
    ready: EngineReady,
    draft_step_seconds: float | None,
    kv_events: KVEvents | None,
) -> Scheduler:
    """`draft_step_seconds`: how long a draft worker takes for a token; None: there is none."""
    speculation = None
    if config.speculative_config is not None:
        steps_ahead = startup.max_steps_in_flight > 1
        costs = startup.costs
        if draft_step_seconds is not None:
            costs = replace(costs, draft=draft_step_seconds)
        speculation = SpeculationPlan(config.speculative_config, steps_ahead=steps_ahead, costs=costs)
    limits = Limits(
        max_model_len=ready.max_model_len,
        num_blocks=ready.num_blocks,
        block_size=ready.block_size,
        max_num_seqs=ready.max_num_seqs,
        max_num_batched_tokens=ready.max_num_batched_tokens,
        max_prompt_tokens=startup.max_prompt_tokens,
        attention_parity=startup.attention_parity,
        max_draft_tokens=config.max_draft_tokens,
        num_state_slots=startup.num_state_slots,
        max_adapters=config.num_adapter_slots,
        pools_every_token=ready.pooling is not None and ready.pooling.kind != "LAST",
    )
    return Scheduler(
        limits,
        policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
        max_request_crashes=config.max_request_crashes,
        speculation=speculation,
        kv_events=kv_events,
    )
