"""A draft model's guesses of how requests go on.

The guesses are samples of the ordinary rule, with the request's own noise, parameters and positions: wherever the two
models' distributions agree, the guess is the token that the target will sample. A sequence's blocks are its own; when
they run out, those of the sequence that has not been asked about for longest are taken, and computed again if needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import ExecuteStep, NewRequest, Propose, SampledTokens, ScheduledRequest
from sempre.workers.backend import Runner


@dataclass
class _Sequence:
    """The tokens of a request, and those (guesses may be among them) whose keys and values are in the cache."""

    new: NewRequest
    token_ids: list[int]
    written: list[int] = field(default_factory=list)
    num_checked: int = 0
    """this many of `written` are known to be those of `token_ids`"""
    block_ids: list[int] = field(default_factory=list)
    is_known_to_runner: bool = False

    def forget_wrong_guesses(self) -> None:
        """Keep of what was written the part that the sequence begins with; its last token is always computed."""
        most = min(len(self.written), len(self.token_ids) - 1)
        count = min(self.num_checked, most)
        while count < most and self.written[count] == self.token_ids[count]:
            count += 1
        del self.written[count:]
        self.num_checked = count


@dataclass
class _Guess:
    """What is being guessed for one sequence."""

    sequence: _Sequence
    count: int
    tokens: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.failed and len(self.tokens) < self.count


class Drafting:
    """Sequences by request id, and the runner of the draft model, used by nobody else."""

    def __init__(self, runner: Runner, *, max_num_seqs: int) -> None:
        self._runner = runner
        self._max_num_seqs = max_num_seqs
        self._free_blocks = list(range(runner.cache.num_blocks - 1, -1, -1))
        self._sequences: dict[str, _Sequence] = {}  # in the order in which they were last asked about
        self._gone: list[str] = []

    def add(self, new: NewRequest) -> None:
        """A request with all tokens known so far."""
        params = replace(new.params, logprobs=None, prompt_logprobs=None)
        self._sequences[new.request_id] = _Sequence(replace(new, params=params), list(new.token_ids))

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Raises ProtocolError for a request that is not known."""
        self._sequence(request_id).token_ids += token_ids

    def remove(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._release(sequence)

    def answer(self, command: Propose) -> list[list[int]]:
        """All that a Propose asks for. Raises ProtocolError."""
        self.remove(command.finished_request_ids)
        for new in command.new_requests:
            self.add(new)
        for item in command.requests:
            self.extend(item.request_id, item.token_ids)
        return self.propose([(item.request_id, item.num_drafts) for item in command.requests])

    def follow(self, step: ExecuteStep, sampled: Sequence[SampledTokens]) -> list[SampledTokens]:
        """Take over what a step of the target has brought, and add the guesses that the step asked for."""
        self.remove(step.finished_request_ids)
        for new in step.new_requests:
            self.add(new)
        wanted = []
        for item, result in zip(step.scheduled, sampled, strict=True):
            self.extend(item.request_id, result.token_ids)
            if item.num_drafts and result.token_ids:
                wanted.append((item.request_id, item.num_drafts))
        guesses = dict(zip((name for name, _ in wanted), self.propose(wanted), strict=True))
        return [
            replace(result, draft_token_ids=guesses[result.request_id]) if guesses.get(result.request_id) else result
            for result in sampled
        ]

    def propose(self, wanted: Sequence[tuple[str, int]]) -> list[list[int]]:
        """At most so many guesses for each request; fewer, or none, where they do not fit or cannot be sampled."""
        guesses = [_Guess(self._sequence(request_id), count) for request_id, count in wanted]
        for start in range(0, len(guesses), self._max_num_seqs):
            self._guess(guesses[start : start + self._max_num_seqs])
        return [guess.tokens for guess in guesses]

    def _guess(self, guesses: list[_Guess]) -> None:
        asked = {guess.sequence.new.request_id for guess in guesses}
        for request_id in asked:
            self._sequences[request_id] = self._sequences.pop(request_id)
        for guess in guesses:
            sequence = guess.sequence
            sequence.forget_wrong_guesses()
            length = len(sequence.token_ids)
            guess.count = min(guess.count, self._runner.max_model_len - length)
            guess.failed = guess.count < 1 or not self._make_room(sequence, length + guess.count - 1, asked)
        self._catch_up([guess for guess in guesses if guess.goes_on])
        while going_on := [guess for guess in guesses if guess.goes_on]:
            self._run([self._scheduled(guess, 1) for guess in going_on], going_on)

    def _catch_up(self, guesses: list[_Guess]) -> None:
        """Compute what is missing, in steps of as many tokens as one may have; the last of each gives a guess."""
        new_requests = []
        for guess in guesses:
            sequence = guess.sequence
            if sequence.is_known_to_runner:
                self._gone.append(sequence.new.request_id)
            sequence.is_known_to_runner = True
            new_requests.append(replace(sequence.new, token_ids=sequence.token_ids.copy()))
        while behind := [guess for guess in guesses if not guess.tokens and not guess.failed]:
            budget = self._runner.max_num_batched_tokens
            scheduled = []
            for guess in behind:
                missing = min(len(guess.sequence.token_ids) - len(guess.sequence.written), budget)
                if missing:
                    scheduled.append(self._scheduled(guess, missing))
                    budget -= missing
            self._run(scheduled, behind[: len(scheduled)], new_requests)
            new_requests = []

    def _scheduled(self, guess: _Guess, num_tokens: int) -> ScheduledRequest:
        sequence = guess.sequence
        start = len(sequence.written)
        tokens = (sequence.token_ids + guess.tokens)[start : start + num_tokens]
        sequence.written += tokens
        return ScheduledRequest(
            request_id=sequence.new.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=sequence.block_ids,
        )

    def _run(
        self, scheduled: list[ScheduledRequest], guesses: list[_Guess], new_requests: Sequence[NewRequest] = ()
    ) -> None:
        gone, self._gone = self._gone, []
        step = ExecuteStep(step_id=0, finished_request_ids=gone, new_requests=list(new_requests), scheduled=scheduled)
        for guess, result in zip(guesses, self._runner.execute(step), strict=True):
            guess.tokens += result.token_ids
            guess.failed = result.error is not None

    def _make_room(self, sequence: _Sequence, num_tokens: int, asked: set[str]) -> bool:
        missing = -(-num_tokens // self._runner.cache.block_size) - len(sequence.block_ids)
        for request_id in list(self._sequences):
            if len(self._free_blocks) >= missing:
                break
            if request_id not in asked:
                self._release(self._sequences[request_id])
        if len(self._free_blocks) < missing:
            return False
        sequence.block_ids += [self._free_blocks.pop() for _ in range(missing)]
        return True

    def _release(self, sequence: _Sequence) -> None:
        """Give its blocks back, and let the runner forget it with its next step."""
        self._free_blocks += reversed(sequence.block_ids)
        sequence.block_ids = []
        sequence.written.clear()
        sequence.num_checked = 0
        if sequence.is_known_to_runner:
            sequence.is_known_to_runner = False
            self._gone.append(sequence.new.request_id)

    def _sequence(self, request_id: str) -> _Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise ProtocolError(f"Propose: expected a known request, found {request_id!r}")
        return sequence
