"""Which request computes what in the next step: continuous batching over a paged, prefix-cached KV cache.

    scheduler.py         Scheduler: add, abort, schedule, update, restart
    planner.py           StepPlanner: which request computes what in the next step
    crash_isolation.py   CrashIsolation: after a crash, requests run alone until the one that caused it is found
    request.py           Request: one sequence and its progress
    limits.py            Limits: limits of a sequence and of a step
    planned_step.py      PlannedStep: a step under construction or in flight, and the check of its result
    kv_cache_manager.py  KVCacheManager: block tables of requests; prefix hits
    state_slots.py       StateSlots: slots of states, for models that keep them; snapshots
    block_pool.py        BlockPool: reference counts, free blocks, order of eviction
    prefix_cache.py      PrefixCache: content of a full block ↔ block
    kv_events.py         KVEvents: which blocks have become findable, and which no longer are
    stats.py             SchedulerStats

Pure Python: no I/O, no clock, no randomness, no tensors. The same sequence of calls gives the same steps.
"""

from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.scheduler import Scheduler
from sempre.engine.scheduling.stats import SchedulerStats

__all__ = ["Limits", "Scheduler", "SchedulerStats"]
