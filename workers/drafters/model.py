"""Draft tokens of a draft model, and the sequences it drafts for.

They are sampled like the target's, with the request's own noise, parameters and positions: wherever the two models'
distributions agree, the draft token is the one that the target will sample. A sequence's blocks are its own; when they
run out, those of the least recently used sequence are taken, and recomputed if needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import DraftRequest, ExecuteStep, NewRequest, SampledTokens
from sempre.workers.drafters.base import MAX_DRAFT_TOKENS, DraftModelRunner, DraftTask
from sempre.workers.runner import ComputedStep


@dataclass
class _Sequence:
    """The tokens of a request, and the last drafts for it.

    token_ids   | ……………………………………… known ……………………………………… |
    drafts                    drafted_at | right … | wrong … |
    """

    new: NewRequest
    token_ids: list[int]
    keeps_states: bool
    """whether it can only go on after as many tokens as were known at its last drafts"""
    num_computed: int = 0
    """keys and values, or states, of this many tokens are in the cache, drafts possibly among them"""
    drafted_at: int = 0
    drafts: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    is_admitted: bool = False
    has_failed: bool = False
    """its last step could not be sampled: no further drafts"""

    @property
    def max_drafts(self) -> int:
        """Every verified draft token is followed by one of the request's own."""
        if self.has_failed:
            return 0
        return self.new.num_prompt_tokens + self.new.params.max_tokens - 1 - len(self.token_ids)

    def forget_wrong_drafts(self) -> int:
        """How many tokens were known or drafted correctly; the last one is always computed."""
        num_right = self.drafted_at
        for draft, token_id in zip(self.drafts, self.token_ids[self.drafted_at :], strict=False):
            if draft != token_id:
                break
            num_right += 1
        resumable = min(num_right, len(self.token_ids) - 1)
        if self.num_computed > resumable:
            self.num_computed = 0 if self.keeps_states else resumable
        return num_right

    def take(self, drafts: list[int]) -> None:
        """Store drafts made after all known tokens."""
        self.drafted_at, self.drafts = len(self.token_ids), drafts
        if drafts:
            self.num_computed = len(self.token_ids) + (0 if self.keeps_states else len(drafts) - 1)


class ModelDrafter:
    """Sequences by request id, and a draft runner of their own."""

    def __init__(self, runner: DraftModelRunner, *, max_num_seqs: int) -> None:
        self._runner = runner
        # a step has no more rows than tokens
        self._max_num_seqs = min(max_num_seqs, runner.limits.max_num_batched_tokens)
        self._free_blocks = list(range(runner.cache.num_blocks - 1, -1, -1))
        self._sequences: dict[str, _Sequence] = {}  # least recently used first
        self._num_admitted = 0
        self._keeps_states = runner.limits.num_state_slots > 0

    def add(self, new: NewRequest) -> None:
        """A request with all tokens known so far. Drafts are the draft model's own, without the request's adapter."""
        params = replace(new.params, logprobs=None, prompt_logprobs=None, prompt_candidates=None)
        self._sequences[new.request_id] = _Sequence(
            replace(new, params=params, adapter=None), list(new.token_ids), self._keeps_states
        )

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._release_blocks(sequence)
                self._dismiss(sequence)

    def observe(self, step: ExecuteStep, sampled: Sequence[SampledTokens] = ()) -> None:
        """Record what a step says about requests, and what the target sampled in it. Raises MessageMalformed."""
        self.remove(step.finished_request_ids)
        for new in step.new_requests:
            self.add(new)
        for result in sampled:
            sequence = self._sequence(result.request_id)
            sequence.token_ids += result.token_ids
            sequence.has_failed = result.error is not None

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """For each request at most as many tokens as it asks for; fewer, or none, where they do not fit or cannot be
        sampled. Raises MessageMalformed."""
        for item in requests:
            self._sequence(item.request_id).token_ids += item.token_ids
        drafts: dict[str, list[int]] = {}
        for start in range(0, len(requests), self._max_num_seqs):
            asked = requests[start : start + self._max_num_seqs]
            drafts |= self._draft({item.request_id: item.num_drafts for item in asked})
        return [drafts.get(item.request_id, []) for item in requests]

    def _draft(self, counts: dict[str, int]) -> dict[str, list[int]]:
        """Drafts by request id, for requests that allow them."""
        sequences = {request_id: self._sequence(request_id) for request_id in counts}
        for request_id, sequence in sequences.items():
            del self._sequences[request_id]
            self._sequences[request_id] = sequence
        tasks = [
            task
            for request_id, count in counts.items()
            if (task := self._task(sequences[request_id], count, counts)) is not None
        ]
        answers = self._runner.draft(tasks) if tasks else []
        found = {}
        for task, tokens in zip(tasks, answers, strict=True):
            sequence = sequences[task.request_id]
            sequence.take(tokens)
            if len(tokens) < task.count:
                self._dismiss(sequence)
            found[task.request_id] = tokens
        return found

    def _task(self, sequence: _Sequence, count: int, asked: dict[str, int]) -> DraftTask | None:
        """What to draft, with blocks for it and a place in the runner; None when there is nothing to draft or no
        room."""
        num_right = sequence.forget_wrong_drafts()
        length = len(sequence.token_ids)
        count = min(count, MAX_DRAFT_TOKENS, sequence.max_drafts, self._runner.limits.max_model_len - length)
        if count < 1 or not self._make_room(sequence, length + count - 1, asked):
            return None
        if not sequence.is_admitted:
            num_right = length
            if not self._admit(sequence, asked):
                return None
        return DraftTask(
            request_id=sequence.new.request_id,
            token_ids=sequence.token_ids,
            num_unchanged=num_right,
            num_computed=sequence.num_computed,
            block_ids=sequence.block_ids,
            count=count,
        )

    def _admit(self, sequence: _Sequence, asked: dict[str, int]) -> bool:
        """The runner has room for as many sequences as one proposal has."""
        for request_id in self._sequences:
            if self._num_admitted < self._max_num_seqs:
                break
            if request_id not in asked:
                self._dismiss(self._sequences[request_id])
        sequence.is_admitted = self._runner.admit(replace(sequence.new, token_ids=sequence.token_ids.copy()))
        self._num_admitted += sequence.is_admitted
        return sequence.is_admitted

    def _dismiss(self, sequence: _Sequence) -> None:
        """Have the runner forget it; its keys and values stay, its states do not."""
        if sequence.is_admitted:
            self._runner.release(sequence.new.request_id)
            sequence.is_admitted = False
            self._num_admitted -= 1
            if self._keeps_states:
                sequence.num_computed = 0

    def _make_room(self, sequence: _Sequence, num_tokens: int, asked: dict[str, int]) -> bool:
        missing = -(-num_tokens // self._runner.cache.block_size) - len(sequence.block_ids)
        for request_id in self._sequences:
            if len(self._free_blocks) >= missing:
                break
            if request_id not in asked:
                self._release_blocks(self._sequences[request_id])
        if len(self._free_blocks) < missing:
            return False
        sequence.block_ids += [self._free_blocks.pop() for _ in range(missing)]
        return True

    def _release_blocks(self, sequence: _Sequence) -> None:
        self._free_blocks += reversed(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0

    def _sequence(self, request_id: str) -> _Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            field = "drafts.request_id"
            text = f"ExecuteStep: {field}: expected a known request, found {request_id!r}"
            raise MessageMalformed(text, field=field)
        return sequence


class DraftSteps:
    """The steps of a worker that only drafts: they have no tokens to compute."""

    def __init__(self) -> None:
        self._steps: deque[ExecuteStep] = deque()

    @property
    def steps_in_flight(self) -> int:
        return len(self._steps)

    def submit(self, step: ExecuteStep) -> None:
        self._steps.append(step)

    def step_done(self) -> bool:
        return True

    def collect(self) -> ComputedStep:
        return ComputedStep(self._steps.popleft(), [])
