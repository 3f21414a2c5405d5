"""A draft model on a CPU: it takes ordinary steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sempre.ipc.messages import ExecuteStep, NewRequest, ScheduledRequest
from sempre.workers.cpu.runner import CpuModelRunner
from sempre.workers.drafters.base import DraftTask


@dataclass
class _Progress:
    """A task in progress."""

    task: DraftTask
    num_computed: int
    drafts: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.failed and len(self.drafts) < self.task.count

    def scheduled(self, num_tokens: int) -> ScheduledRequest:
        start = self.num_computed
        self.num_computed += num_tokens
        return ScheduledRequest(
            request_id=self.task.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=self.task.block_ids,
        )


class CpuDraftModelRunner:
    """Drafts token by token, with steps of a CPU runner of its own."""

    def __init__(self, runner: CpuModelRunner) -> None:
        self.cache = runner.cache
        self.limits = runner.limits
        self._runner = runner
        # both go into the next step
        self._new: dict[str, NewRequest] = {}
        self._gone: list[str] = []

    def admit(self, new: NewRequest) -> bool:
        self._new[new.request_id] = new
        return True

    def release(self, request_id: str) -> None:
        if self._new.pop(request_id, None) is None:
            self._gone.append(request_id)

    def draft(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        for task in tasks:
            if task.request_id not in self._new:
                self._runner.revise(task.request_id, task.num_unchanged, task.token_ids[task.num_unchanged :])
        all_progress = [_Progress(task, task.num_computed) for task in tasks]
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
