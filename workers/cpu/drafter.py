"""A draft model on a CPU: it takes ordinary steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sempre.ipc.messages import ExecuteStep, NewRequest, ScheduledRequest
from sempre.workers.cpu.runner import CpuModelRunner
from sempre.workers.drafters.base import DraftTask
from sempre.workers.state_cache import DRAFT_SLOTS


class _Slots(NamedTuple):
    """Of a sequence whose layers keep states. A proposal goes on from the state after the tokens that were known at the
    last one, whatever became of its drafts."""

    known: int
    """after all known tokens, or as many as are computed yet"""
    drafted: int
    """after the last draft that is computed"""


@dataclass
class _Progress:
    """A task in progress."""

    task: DraftTask
    num_computed: int
    slots: _Slots | None = None
    drafts: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.failed and len(self.drafts) < self.task.count

    def scheduled(self, num_tokens: int) -> ScheduledRequest:
        start, end = self.num_computed, self.num_computed + num_tokens
        self.num_computed = end
        return ScheduledRequest(
            request_id=self.task.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=self.task.block_ids,
            state_read=self._slot_after(start) if start else -1,
            state_writes=[] if self.slots is None else [(num_tokens - 1, self._slot_after(end))],
        )

    def _slot_after(self, num_tokens: int) -> int:
        """Of the state after so many tokens."""
        if self.slots is None:
            return -1
        return self.slots.known if num_tokens <= len(self.task.token_ids) else self.slots.drafted


class CpuDraftModelRunner:
    """Drafts token by token, with steps of a CPU runner of its own."""

    def __init__(self, runner: CpuModelRunner) -> None:
        self.cache = runner.cache
        self.limits = runner.limits
        self._runner = runner
        # both go into the next step
        self._new: dict[str, NewRequest] = {}
        self._gone: list[str] = []
        count = runner.limits.num_state_slots // DRAFT_SLOTS
        self._free_slots = [_Slots(DRAFT_SLOTS * i, DRAFT_SLOTS * i + 1) for i in reversed(range(count))]
        self._slots: dict[str, _Slots] = {}

    def admit(self, new: NewRequest) -> bool:
        self._new[new.request_id] = new
        if self.limits.num_state_slots:
            self._slots[new.request_id] = self._free_slots.pop()
        return True

    def release(self, request_id: str) -> None:
        if request_id in self._slots:
            self._free_slots.append(self._slots.pop(request_id))
        if self._new.pop(request_id, None) is None:
            self._gone.append(request_id)

    def draft(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        for task in tasks:
            if task.request_id not in self._new:
                self._runner.revise(task.request_id, task.num_unchanged, task.token_ids[task.num_unchanged :])
        all_progress = [_Progress(task, task.num_computed, self._slots.get(task.request_id)) for task in tasks]
        self._catch_up(all_progress)
        while going_on := [progress for progress in all_progress if progress.goes_on]:
            self._run([progress.scheduled(1) for progress in going_on], going_on)
        return [progress.drafts for progress in all_progress]

    def prepare(self) -> None:
        return

    def _catch_up(self, all_progress: list[_Progress]) -> None:
        """Compute what is missing, in steps of as many tokens as allowed; each task's last token yields a draft
        token."""
        while behind := [progress for progress in all_progress if not progress.drafts and not progress.failed]:
            budget = self.limits.max_num_batched_tokens
            scheduled = []
            for progress in behind:
                missing = min(len(progress.task.token_ids) - progress.num_computed, budget)
                if missing:
                    scheduled.append(progress.scheduled(missing))
                    budget -= missing
            self._run(scheduled, behind[: len(scheduled)])

    def _run(self, scheduled: list[ScheduledRequest], all_progress: list[_Progress]) -> None:
        gone, self._gone = self._gone, []
        new, self._new = list(self._new.values()), {}
        step = ExecuteStep(step_id=0, finished_request_ids=gone, new_requests=new, scheduled=scheduled)
        for progress, result in zip(all_progress, self._runner.execute(step), strict=True):
            progress.drafts += result.token_ids
            progress.failed = result.error is not None
