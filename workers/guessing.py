"""What guesses how sequences go on, with a draft model on one device; here the CPU's, which takes ordinary steps.

A sequence stays with its guesser from one proposal to the next. The guesser takes what it guessed for what comes next;
at the next proposal it is told from which token on that was wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sempre.ipc.messages import ExecuteStep, NewRequest, ScheduledRequest
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.model_runner import ModelRunner

# guesses for one sequence in one proposal
MOST_GUESSES = 32


@dataclass(frozen=True)
class Continuation:
    """What is to be guessed for one sequence.

    token_ids   | known ……………………………………………………… | guesses … |
                0        num_computed          len(token_ids)   len(token_ids) + count
    """

    request_id: str
    token_ids: list[int]
    """all that are known; not to be changed"""
    num_unchanged: int
    """the guesser knows the first so many of them, as admitted or as guessed by it"""
    num_computed: int
    """keys and values of so many are in the cache, at least one less than are known"""
    block_ids: list[int]
    """all blocks, enough for every token but the last guess"""
    count: int
    """in [1, MOST_GUESSES]; no guess lies past the last token that the request may have"""


class Guesser(Protocol):
    """Samples by the ordinary rule, with the noise and the parameters of the request."""

    cache: PagedKvCache
    max_model_len: int
    max_num_batched_tokens: int

    def admit(self, new: NewRequest) -> bool:
        """Take in a sequence as it is now; False when its parameters cannot be used, and nothing was taken in."""

    def release(self, request_id: str) -> None:
        """Forget a sequence that was admitted."""

    def guess(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """`count` guesses for each; fewer where a token cannot be sampled: such a sequence must be released.

        There are at most as many sequences as one step takes, all of them admitted.
        """

    def prepare(self) -> None:
        """Before the first request: whatever makes proposals fast."""


@dataclass
class _Progress:
    """A continuation on its way."""

    item: Continuation
    num_computed: int
    guesses: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.failed and len(self.guesses) < self.item.count

    def scheduled(self, num_tokens: int) -> ScheduledRequest:
        start = self.num_computed
        self.num_computed += num_tokens
        return ScheduledRequest(
            request_id=self.item.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=self.item.block_ids,
        )


class StepGuesser:
    """Guesses token by token, with steps of a CPU's runner that nobody else uses."""

    def __init__(self, runner: ModelRunner) -> None:
        self.cache = runner.cache
        self.max_model_len = runner.max_model_len
        self.max_num_batched_tokens = runner.max_num_batched_tokens
        self._runner = runner
        # both are told with the next step
        self._new: dict[str, NewRequest] = {}
        self._gone: list[str] = []

    def admit(self, new: NewRequest) -> bool:
        self._new[new.request_id] = new
        return True

    def release(self, request_id: str) -> None:
        if self._new.pop(request_id, None) is None:
            self._gone.append(request_id)

    def guess(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        for item in continuations:
            if item.request_id not in self._new:
                self._runner.revise(item.request_id, item.num_unchanged, item.token_ids[item.num_unchanged :])
        all_progress = [_Progress(item, item.num_computed) for item in continuations]
        self._catch_up(all_progress)
        while going_on := [progress for progress in all_progress if progress.goes_on]:
            self._run([progress.scheduled(1) for progress in going_on], going_on)
        return [progress.guesses for progress in all_progress]

    def prepare(self) -> None:
        return

    def _catch_up(self, all_progress: list[_Progress]) -> None:
        """Compute what is missing, in steps of as many tokens as one may have; the last of each gives a guess."""
        while behind := [progress for progress in all_progress if not progress.guesses and not progress.failed]:
            budget = self.max_num_batched_tokens
            scheduled = []
            for progress in behind:
                missing = min(len(progress.item.token_ids) - progress.num_computed, budget)
                if missing:
                    scheduled.append(progress.scheduled(missing))
                    budget -= missing
            self._run(scheduled, behind[: len(scheduled)])

    def _run(self, scheduled: list[ScheduledRequest], all_progress: list[_Progress]) -> None:
        gone, self._gone = self._gone, []
        new, self._new = list(self._new.values()), {}
        step = ExecuteStep(step_id=0, finished_request_ids=gone, new_requests=new, scheduled=scheduled)
        for progress, result in zip(all_progress, self._runner.execute(step), strict=True):
            progress.guesses += result.token_ids
            progress.failed = result.error is not None
