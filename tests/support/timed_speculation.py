"""A worker on a simulated clock: what speculation costs and brings, exactly.

The scheduler is the real one; steps, drafts and results take the time that is given.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sempre.engine.harness import make_request
from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.messages import ExecuteStep, SampledTokens, StepResult

PROMPT = 4


@dataclass(frozen=True)
class Machine:
    """Seconds."""

    step: float
    """a decode step of one request"""
    row: float
    """each further row"""
    draft: float
    """a draft token, for all requests at once"""
    result: float
    """from the end of a step on the device to the beginning of one that depends on its result"""
    depth: int = 2
    """steps in flight"""
    capture: float = 0.0
    """the first step of a shape"""
    noise: float = 0.0
    """some steps take this much longer"""
    noisy_percent: int = 5

    def seconds(self, step: ExecuteStep) -> float:
        rows = sum(item.num_tokens for item in step.scheduled)
        drafts = max((item.num_drafts for item in step.drafts), default=0)
        return self.step + self.row * (rows - 1) + self.draft * drafts

    @staticmethod
    def shape(step: ExecuteStep) -> tuple[int, int, int]:
        """A graph is captured for it."""
        rows = sum(item.num_tokens for item in step.scheduled)
        drafts = max((item.num_drafts for item in step.drafts), default=0)
        return len(step.scheduled), rows.bit_length(), drafts


def token(request: int, position: int) -> int:
    return (request * 7919 + position * position * 31 + position) % 997


def is_right(request: int, position: int, share: float) -> bool:
    """Whether the draft for this position is, for about that share of positions."""
    return (request * 2654435761 + position * 40503 * (position + 1)) % 1009 < share * 1009


def draft(request: int, position: int, share: float) -> int:
    return token(request, position) + (0 if is_right(request, position, share) else 1000)


class Run:
    """Requests on a machine, all at once, round after round."""

    def __init__(self, machine: Machine, plan: SpeculationPlan | None, *, share: float = 0.0) -> None:
        limits = Limits(
            num_blocks=4096,
            block_size=16,
            max_model_len=4096,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            max_draft_tokens=256,
        )
        self.scheduler = Scheduler(limits, policy="fcfs", enable_prefix_caching=False, speculation=plan)
        self.machine = machine
        self.share = share
        self.now = 0.0
        self._device_free = 0.0
        self._names = 0
        self._captured: set[tuple[int, int, int]] = set()

    def generate(self, num_requests: int, num_tokens: int) -> float:
        """Seconds until all have `num_tokens`."""
        began = self.now
        for _ in range(num_requests):
            name = self._names = self._names + 1
            self.scheduler.add(make_request([0] * PROMPT, ordinal=name, request_id=str(name), max_tokens=num_tokens))
        flying: deque[tuple[ExecuteStep, float]] = deque()
        while self.scheduler.has_unfinished() or flying:
            while len(flying) < self.machine.depth and (step := self.scheduler.schedule(self.now)) is not None:
                begin = max(self.now + self.machine.result / 2, self._device_free)
                self._device_free = begin + self.machine.seconds(step)
                if (shape := self.machine.shape(step)) not in self._captured:
                    self._captured.add(shape)
                    self._device_free += self.machine.capture
                if (step.step_id * 2654435761 >> 7) % 100 < self.machine.noisy_percent:
                    self._device_free += self.machine.noise
                flying.append((step, self._device_free + self.machine.result / 2))
            step, answered = flying.popleft()
            self.now = max(self.now, answered)
            result = self._result(step)
            self.scheduler.update(step, result)
            self.scheduler.record_time(step, result, self.now)
        return self.now - began

    def _result(self, step: ExecuteStep) -> StepResult:
        ends, sampled = {}, []
        for item in step.scheduled:
            name, drafts = int(item.request_id), item.draft_token_ids
            position = item.num_computed_tokens + item.num_tokens - len(drafts)
            tokens = [token(name, position)]
            for drafted in drafts:
                if drafted != tokens[-1]:
                    break
                position += 1
                tokens.append(token(name, position))
            sampled.append(SampledTokens(request_id=item.request_id, token_ids=tokens))
            ends[item.request_id] = position + 1
        made = [
            [draft(int(item.request_id), ends[item.request_id] + at, self.share) for at in range(item.num_drafts)]
            for item in step.drafts
        ]
        return StepResult(rank=0, step_id=step.step_id, sampled=sampled, drafts=made)
