"""The engine's core, in a coordinator process or in the user's: requests to replicas, steps to workers.

A step, per replica: `step = scheduler.schedule()`; the workers execute it; `outputs = scheduler.update(step, result)`.
Commands and events go in, client events come out; nothing here waits.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from msgspec.structs import replace

from sempre.engine.coordinator.client_events import in_use, notices_of, outputs_of, refused
from sempre.engine.coordinator.draft_workers import DraftWorkers
from sempre.engine.coordinator.fair_queue import FairQueue
from sempre.engine.coordinator.kv_event_publisher import KVEventPublishers
from sempre.engine.coordinator.metrics_report import Report, metrics_report
from sempre.engine.coordinator.progress_watch import ProgressWatch
from sempre.engine.coordinator.replica import Replica, best_replica
from sempre.engine.coordinator.scheduler_setup import make_scheduler
from sempre.engine.coordinator.sleep import SleepControl
from sempre.engine.coordinator.startup import StartUp
from sempre.engine.coordinator.weights_update import WeightsUpdate
from sempre.engine.coordinator.worker_calls import WorkerCalls
from sempre.engine.executor.base import Executor, draft_ranks
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import MessageMalformed, ProtocolError, RanksDiffer, RequestError, WorkerDied
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    CallMethodReply,
    CallWorkers,
    ClientCommand,
    ClientEvent,
    EngineReady,
    GetHealth,
    GetMetrics,
    GetSleepState,
    HealthReply,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    RequestOutputDelta,
    RequestSpec,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    ResumeRequests,
    SleepEngine,
    SleepReply,
    StepResult,
    UpdateWeights,
    UpdateWeightsReply,
    WakeEngine,
    WorkerEvent,
    WorkerStateChanged,
)

# between two checks of the progress of requests
_LOOK_S = 1.0


class LostWorker(NamedTuple):
    """The consequences of a worker's death."""

    ranks: range
    """ranks of its replica, which restart together"""
    events: list[ClientEvent]
    num_explained_crashes: int
    """crashes of this replica caused by requests that have failed for it"""


class EngineCore:
    """Starts the workers of `executor`, then serves requests with them."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self._config = config
        self._executor = executor
        self._startup = StartUp(config, executor, range(executor.world_size))
        self._replicas: list[Replica] = []
        self._watches: list[ProgressWatch] = []
        self._next_look = 0.0
        self._look_every_s = min(_LOOK_S, config.step_timeout_s / 4)
        self._owners: dict[str, Replica] = {}
        self._held: dict[str, RequestSpec] = {}
        """requests that wait for new weights, or for the engine to wake up"""
        self._fair = FairQueue(uses_priority=config.scheduling_policy == "priority")
        self._calls = WorkerCalls(executor)
        self._weights = WeightsUpdate(executor, self._startup)
        self._sleep = SleepControl(executor, self._startup)
        self._kv_events = KVEventPublishers(config.kv_events_config, config.data_parallel_size)
        self._drafts = DraftWorkers(config, executor) if draft_ranks(config) else None
        self.ready: EngineReady | None = None

    def has_unfinished(self) -> bool:
        """Whether an output or a reply is still pending."""
        has_work = bool(self._fair) or any(replica.has_work for replica in self._replicas)
        computes = has_work and not self._sleep.holds_steps
        return computes or self._calls.pending() or self._weights.is_pending or self._sleep.is_changing

    def close(self) -> None:
        """End what this core has started itself; the executor's owner ends the workers."""
        self._kv_events.close()

    def advance(self) -> list[ClientEvent]:
        """Send the next step to every replica with room for it; return events for the client. Raises WorkerDied."""
        now = time.monotonic()
        notices = [] if self._drafts is None else self._drafts.advance(now)
        events = notices_of(notices)
        if self.ready is not None and not self._weights.is_pending and not self._sleep.holds_steps:
            events += outputs_of([*self._fair.begin(self._replicas, self.ready, self._begin)])
        has_requests = any(replica.num_unfinished or replica.has_work for replica in self._replicas)
        if self._weights.is_waiting and not has_requests:
            self._weights.start()
        if self._sleep.is_waiting:
            waits = self._fair or has_requests if self._sleep.lets_finish else self._is_computing()
            events += [] if waits else self._release()
        if self._sleep.holds_steps:
            self.rest()
        elif not self._weights.is_running:
            for replica in self._replicas:
                replica.advance(now)
        if now > self._next_look:
            self._next_look = now + self._look_every_s
            for watch in self._watches:
                watch.look(now)
        return events

    def rest(self) -> None:
        """Called instead of `advance` while the client is behind: no request makes progress, and none is stalled."""
        for watch in self._watches:
            watch.forget()

    def next_deadline(self) -> float | None:
        """When `advance` will have something to do without a new message, if known (time.monotonic)."""
        now = time.monotonic()
        deadlines = [replica.next_deadline(now) for replica in self._replicas]
        if self._drafts is not None:
            deadlines.append(self._drafts.next_deadline(now))
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def next_events(self) -> list[ClientEvent] | None:
        """Events for the client from the next event of a worker; None if there is none.

        Raises errors that end the engine, and WorkerDied. Once serving, the death of a draft worker only costs speed.
        """
        try:
            arrival = self._executor.receive()
        except WorkerDied as error:
            if self._drafts is None or error.rank not in self._drafts.ranks or self.ready is None:
                raise
            return notices_of(self._drafts.lose(error.rank, error))
        if arrival is None:
            return None
        events = self.handle_event(*arrival)
        self._kv_events.flush()
        return events

    def lose_worker(self, error: WorkerDied) -> LostWorker:
        """Make all unfinished requests of the worker's replica wait for new workers."""
        replica = self._replicas[error.rank // self._config.replica_size]
        failed = replica.lose_workers(error.cause)
        self._kv_events.flush()
        self._fair.count(failed)
        for delta in failed:
            del self._owners[delta.request_id]
        self._startup.forget(replica.ranks)
        events: list[ClientEvent] = [*self._calls.lose(replica.ranks, error), *outputs_of([*failed])]
        events += self._updated(self._weights.lose(replica.ranks, error))
        self._sleep.lose(replica.ranks)
        num_explained = self._config.max_request_crashes if failed else 0
        return LostWorker(replica.ranks, events, num_explained)

    def handle_event(self, rank: int, event: WorkerEvent) -> list[ClientEvent]:
        """Return events for the client from a worker's event. Raises errors that end the engine."""
        if self._drafts is not None and rank in self._drafts.ranks:
            return [*notices_of(self._drafts.handle(rank, event)), *self._end_start_up()]
        match event:
            case StepResult():
                outputs = self._take(rank, event)
                self._fair.count(outputs)
                for output in outputs:
                    if output.finish_reason is not None:
                        del self._owners[output.request_id]
                return [OutputsReady(outputs=outputs)] if outputs else []
            case CallMethodReply():
                reply = self._calls.take(rank, event)
                if reply is not None:
                    return [reply]
                return [*self._updated(self._weights.take(rank, event)), *self._changed(self._sleep.take(rank, event))]
            case _:
                return self._start_up(rank, event)

    def handle_command(self, command: ClientCommand) -> list[ClientEvent]:
        """Raises MessageMalformed for an unexpected command."""
        if self.ready is None:
            name = type(command).__name__
            raise MessageMalformed(f"{name}: expected no command before EngineReady, found {name}", field="tag")
        match command:
            case AddRequests(requests=requests):
                return outputs_of([self._add(spec) for spec in requests])
            case AbortRequests(request_ids=request_ids, finish_reason=reason):
                return outputs_of([self._abort(request_id, reason) for request_id in request_ids])
            case PauseRequests(request_ids=request_ids):
                for request_id in request_ids:
                    self._fair.pause(request_id)
                    if request_id in self._owners:
                        self._owners[request_id].pause_request(request_id)
                return []
            case ResumeRequests(request_ids=request_ids):
                for request_id in request_ids:
                    self._fair.resume(request_id)
                    if request_id in self._owners:
                        self._owners[request_id].resume_request(request_id)
                return []
            case CallWorkers():
                self._calls.start(command)
                return []
            case ResetPrefixCache(call_id=call_id):
                return [ResetPrefixCacheReply(call_id=call_id, done=self._reset_prefix_cache())]
            case UpdateWeights():
                asleep = self._sleep.refuse_weights(sum(replica.num_unfinished for replica in self._replicas))
                refusal = self._weights.accept(command, asleep)
                return [] if refusal is None else [refusal]
            case SleepEngine() | WakeEngine():
                return self._change_sleep(command)
            case GetSleepState(call_id=call_id):
                return [*self._sleep.state(call_id)]
            case GetMetrics(call_id=call_id):
                values = self._metrics()
                return [MetricsReply(call_id=call_id, values=values)]
            case GetHealth(call_id=call_id):
                now, limit_s = time.monotonic(), self._config.step_timeout_s
                if self._sleep.holds_steps:
                    self.rest()
                stalled = [found for watch in self._watches if (found := watch.stalled(now, limit_s)) is not None]
                reports, count = self._executor.health(), self._executor.world_size
                workers, drafts = reports[:count], reports[count:]
                return [HealthReply(call_id=call_id, workers=workers, stalled=stalled, draft_workers=drafts)]
            case _:
                name = type(command).__name__
                raise MessageMalformed(f"{name}: expected a command of a serving engine, found {name}", field="tag")

    def _metrics(self) -> Report:
        speculative = self._config.speculative_config
        longest = 0 if speculative is None else speculative.num_speculative_tokens
        first, *others = (replica.stats() for replica in self._replicas)
        # no replica has them yet
        first = replace(first, num_waiting=first.num_waiting + len(self._fair))
        return metrics_report([first, *others], speculation=longest)

    def _take(self, rank: int, result: StepResult) -> list[RequestOutputDelta]:
        try:
            return self._replicas[rank // self._config.replica_size].take(rank, result)
        except ProtocolError as error:
            raise self._executor.blame(rank, error) from error
        except RanksDiffer as error:
            raise self._executor.blame(error.rank, error) from error

    def _start_up(self, rank: int, event: WorkerEvent) -> list[ClientEvent]:
        if self._startup.ready is not None:
            return self._rejoin(rank, event)
        # not before: an error now reaches the client
        self._kv_events.open()
        progress = self._startup.handle(rank, event)
        return [*progress, *self._end_start_up()]

    def _end_start_up(self) -> list[ClientEvent]:
        """All workers are ready: create the replicas, and tell the client."""
        ready = self._startup.ready
        if self.ready is not None or ready is None or (self._drafts is not None and not self._drafts.are_ready):
            return []
        if self._drafts is not None:
            ready = replace(ready, draft_worker_pids=self._drafts.serve(self._startup))
        draft_step_seconds = None if self._drafts is None else self._drafts.step_seconds
        size = self._config.replica_size
        for first in range(0, self._executor.world_size, size):
            ranks = range(first, first + size)
            depth, lead_s = self._startup.max_steps_in_flight, self._startup.step_lead_s
            link = None if self._drafts is None else self._drafts.links[first // size]
            events = self._kv_events.follow(first // size, ready.block_size)
            scheduler = make_scheduler(self._config, self._startup, ready, draft_step_seconds, events)
            self._watches.append(ProgressWatch(first, scheduler))
            self._replicas.append(
                Replica(
                    ranks,
                    scheduler,
                    self._executor,
                    link,
                    max_steps_in_flight=depth,
                    step_lead_s=lead_s,
                    ranks_per_stage=self._config.tensor_parallel_size,
                )
            )
        self.ready = ready
        return [ready]

    def _rejoin(self, rank: int, event: WorkerEvent) -> list[ClientEvent]:
        """A new worker has progressed; its replica continues when all its ranks are ready."""
        if not self._startup.rejoin(rank, event):
            return []
        replica = self._replicas[rank // self._config.replica_size]
        if self._startup.awaits(replica.ranks):
            return []
        replica.resume()
        # before calls that have waited: they find what their workers had
        updated = self._changed(self._sleep.resume(replica.ranks))
        self._calls.resume(replica.ranks)
        updated += self._updated(self._weights.resume(replica.ranks))
        pids = self._startup.pids
        return [*(WorkerStateChanged(rank=peer, state="ready", pid=pids[peer]) for peer in replica.ranks), *updated]

    def _updated(self, reply: UpdateWeightsReply | None) -> list[ClientEvent]:
        """The end of an update, if it has ended: what is cached comes from the former weights."""
        if reply is None:
            return []
        if reply.error is None:
            for replica in self._replicas:
                replica.reset_prefix_cache()
        return [reply, *self._add_held()]

    def _add_held(self) -> list[ClientEvent]:
        """Add what has waited, unless there is something else to wait for."""
        held, self._held = self._held, {}
        return outputs_of([self._add(spec) for spec in held.values()])

    def _change_sleep(self, command: SleepEngine | WakeEngine) -> list[ClientEvent]:
        """Begin to fall asleep or to wake up."""
        refusal = self._sleep.refusal(command, updates_weights=self._weights.is_pending)
        if refusal is not None:
            return [refusal]
        aborted: list[ClientEvent] = []
        if isinstance(command, SleepEngine) and command.mode == "abort":
            aborted = outputs_of([self._abort(name, "abort") for name in [*self._owners, *self._held, *self._fair]])
        return [*aborted, *self._changed(self._sleep.accept(command))]

    def _release(self) -> list[ClientEvent]:
        """No step is in flight: what is computed is forgotten, and the workers give back its memory."""
        if self._sleep.clears_cache:
            for replica in self._replicas:
                replica.forget_computed()
            self._kv_events.flush()
        if self._drafts is not None and self._sleep.frees_memory:
            self._drafts.sleep()
        return self._changed(self._sleep.release())

    def _changed(self, reply: SleepReply | None) -> list[ClientEvent]:
        """The end of falling asleep or of waking up, if it has ended."""
        if reply is None:
            return []
        replies: list[ClientEvent] = [reply, *self._sleep.take_answers()]
        if self._sleep.is_pending:
            return replies
        notices = [] if self._drafts is None else self._drafts.wake_up()
        return [*notices_of(notices), *replies, *self._add_held()]

    def _is_computing(self) -> bool:
        return any(replica.is_computing for replica in self._replicas)

    def _add(self, spec: RequestSpec) -> RequestOutputDelta | None:
        """Queue a request, with the best replica for it or to wait for its tenant's turn; or return why not."""
        if self._weights.is_pending or self._sleep.is_pending:
            # it begins with the new weights, or once the engine is awake
            self._held[spec.request_id] = spec
            return None
        if any(spec.request_id in known for known in (self._owners, self._held, self._fair)):
            return refused(spec, in_use(spec))
        if spec.tenant is not None:
            self._fair.add(spec)
            return None
        return self._begin(spec, best_replica(self._replicas, spec))

    def _begin(self, spec: RequestSpec, replica: Replica) -> RequestOutputDelta | None:
        """Queue a request with a replica; or return why not."""
        try:
            replica.add(spec)
        except RequestError as error:
            return refused(spec, error)
        self._owners[spec.request_id] = replica
        return None

    def _abort(self, request_id: str, finish_reason: str) -> RequestOutputDelta | None:
        if self._held.pop(request_id, None) is not None or self._fair.remove(request_id):
            return RequestOutputDelta(request_id=request_id, finish_reason=finish_reason)
        replica = self._owners.pop(request_id, None)
        return None if replica is None else replica.abort(request_id, finish_reason)

    def _reset_prefix_cache(self) -> bool:
        """Reset all replicas or none."""
        if self._fair or any(replica.num_unfinished for replica in self._replicas):
            return False
        done = all(replica.reset_prefix_cache() for replica in self._replicas)
        self._kv_events.flush()
        return done
