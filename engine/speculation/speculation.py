"""One request's drafts for the scheduler, and the plan that creates such objects for all requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sempre.engine.speculation.costs import DraftCosts, DraftLength, DraftMeter, FixedLength
from sempre.engine.speculation.lookup import Drafter, NgramDrafter, SaltedOutputs, SuffixDrafter
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import ExecuteStep, SampledTokens, StepCosts

_SUFFIX_LONGEST = 24
# A draft model without drafts for a request is asked again after this many tokens, and after twice as many with each
# failed try.
_REST = 32
# the round trip to a draft worker
_ASKING_SECONDS = 0.3e-3
Length = DraftLength | FixedLength
MakeDrafter = Callable[[str | None], Drafter]
"""Makes the drafter of one request from its `cache_salt`."""


class Incarnation:
    """One draft worker until its end; its successor is another incarnation."""

    is_gone = False


@dataclass(slots=True)
class Ask:
    """A query to a draft worker for one request, which waits while this is open.

    The wait ends with the answer, with the worker's end, or by itself at the deadline.
    """

    num_known: int
    """number of the request's tokens before the drafts"""
    num_drafts: int
    deadline: float
    worker: Incarnation
    answer: list[int] | None = None

    def is_open(self, now: float) -> bool:
        return self.answer is None and now < self.deadline and not self.worker.is_gone


class Speculation(Protocol):
    """One request's drafts. `token_ids` is its sequence including all received results."""

    ask: Ask | None
    """the query to a draft worker after the last result"""

    def must_wait(self, token_ids: list[int], num_in_flight: int) -> bool:
        """Whether the next step depends on the result of a step in flight."""

    def drafts(self, token_ids: list[int], room: int) -> list[int]:
        """Draft tokens to verify in the step that computes the last token; at most `room`, which may be 0."""

    def num_wanted(self) -> int:
        """Number of draft tokens that the worker should make after that step."""

    def num_to_ask(self) -> int:
        """Number of draft tokens to ask a draft worker for after a result."""

    def sampled(self, token_ids: list[int], drafts: list[int], num_kept: int, drafted: list[int] | None) -> None:
        """A step that verified `drafts` and accepted `num_kept` has returned; `drafted` are the worker's next drafts,
        None if it was not asked for any."""

    def ended(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """The request has ended for any reason."""


class LookupSpeculation:
    """Drafts of a drafter in this process.

    Every new token is compared with the last draft, verified or not, so it costs nothing to notice when drafts become
    worthwhile.
    """

    def __init__(self, drafter: Drafter, length: Length, longest: int) -> None:
        self._drafter = drafter
        self._length = length
        self._longest = longest
        self.ask: Ask | None = None
        self._num_seen = 0
        self._drafts: list[int] = []

    def must_wait(self, token_ids: list[int], num_in_flight: int) -> bool:
        if not num_in_flight:
            return False
        self._follow(token_ids)
        return self._length.current > 0 and len(self._drafts) > 1

    def drafts(self, token_ids: list[int], room: int) -> list[int]:
        self._follow(token_ids)
        return self._drafts[: min(self._length.current, room)]

    def num_wanted(self) -> int:
        return 0

    def num_to_ask(self) -> int:
        return 0

    def sampled(self, token_ids: list[int], drafts: list[int], num_kept: int, drafted: list[int] | None) -> None:
        pass

    def ended(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        if self._num_seen:
            self._follow(token_ids)
            self._drafter.finish(num_prompt_tokens)

    def _follow(self, token_ids: list[int]) -> None:
        new = token_ids[self._num_seen :]
        if not new:
            return
        compared = [token_id == draft for token_id, draft in zip(new, self._drafts, strict=False)]
        missed = False in compared
        self._length.observe(compared.index(False) if missed else len(compared), missed=missed)
        self._drafter.extend(new)
        self._num_seen = len(token_ids)
        # one more than can be verified, since a step may be in flight
        self._drafts = self._drafter.propose(self._longest + 1)


class ModelSpeculation:
    """Drafts of a draft model; `asks_worker`: it has its own worker, which is asked after each result."""

    def __init__(self, length: Length, *, asks_worker: bool) -> None:
        self.ask: Ask | None = None
        self._length = length
        self._asks_worker = asks_worker
        self._drafts: list[int] = []
        self._num_known = -1
        self._rest = 0  # tokens until the draft model is tried again
        self._next_rest = _REST
        self._in_flight = False  # the step whose result decides about drafts

    def must_wait(self, token_ids: list[int], num_in_flight: int) -> bool:
        return num_in_flight > 0 and (self._in_flight or self.num_to_ask() > 0)

    def drafts(self, token_ids: list[int], room: int) -> list[int]:
        if self.ask is not None:
            self._take_answer(self.ask)
        drafts = self._drafts[:room] if self._num_known == len(token_ids) else []
        self._in_flight = bool(drafts)
        return drafts

    def num_wanted(self) -> int:
        # verify the drafts of a probe before asking for more
        if self._asks_worker or (self._length.current == 0 and self._in_flight):
            return 0
        count = self._num_worth()
        self._in_flight = self._in_flight or count > 0
        return count

    def num_to_ask(self) -> int:
        return self._num_worth() if self._asks_worker else 0

    def sampled(self, token_ids: list[int], drafts: list[int], num_kept: int, drafted: list[int] | None) -> None:
        self.ask = None  # it belongs to a shorter sequence
        self._rest = max(0, self._rest - 1)
        if drafts:
            self._length.observe(num_kept, missed=num_kept < len(drafts))
            self._next_rest = _REST
        elif drafted == []:
            self._begin_rest()
        if drafts or drafted is not None:
            self._in_flight = False
        self._drafts, self._num_known = drafted or [], len(token_ids)

    def ended(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        self.ask = None

    def _num_worth(self) -> int:
        """How many draft tokens are worth requesting."""
        return 0 if self._rest else self._length.current

    def _take_answer(self, ask: Ask) -> None:
        """Continue with the draft worker's answer, or without one; a later answer is ignored."""
        self.ask = None
        self._drafts, self._num_known = ask.answer or [], ask.num_known
        if not ask.answer:
            self._begin_rest()

    def _begin_rest(self) -> None:
        if self._length.adapts:
            self._rest = self._next_rest
            self._next_rest *= 2


class SpeculationPlan:
    """Makes a `Speculation` for each request of one replica."""

    def __init__(self, config: SpeculativeConfig, *, steps_ahead: bool, costs: StepCosts) -> None:
        """`steps_ahead`: the worker accepts a step before the result of the previous one is known. `costs`: expected
        costs of the target and of the draft model, wherever it runs."""
        self._config = config
        expected = draft_costs(costs, steps_ahead=steps_ahead, asks_worker=self.asks_worker)
        self._meter = DraftMeter(expected, config.num_speculative_tokens)
        self._make_drafter = DRAFTERS[config.method](config) if config.method in DRAFTERS else None

    @property
    def asks_worker(self) -> bool:
        return self._config.placement == "worker"

    @property
    def may_draft(self) -> bool:
        """Whether any request would have drafts now."""
        return not self._config.adaptive or self._meter.costs is not None or self._meter.trial_length > 0

    def observe(self, step: ExecuteStep, sampled: Sequence[SampledTokens], now: float) -> None:
        """The step was answered `now`, seconds of a steady clock."""
        if self._config.adaptive:
            self._meter.observe(step, sampled, now)

    def forget_times(self) -> None:
        """The worker is another one."""
        self._meter.forget_times()

    def start(self, cache_salt: str | None = None) -> Speculation:
        """Drafts for a request, never from outputs of requests with another `cache_salt`."""
        config = self._config
        longest = config.num_speculative_tokens
        length: Length = FixedLength(longest)
        if config.adaptive:
            length = DraftLength(self._meter, made_together=self._make_drafter is None)
        if self._make_drafter is None:
            return ModelSpeculation(length, asks_worker=self.asks_worker)
        return LookupSpeculation(self._make_drafter(cache_salt), length, longest)


def draft_costs(costs: StepCosts, *, steps_ahead: bool, asks_worker: bool) -> DraftCosts:
    """The costs of drafts, given the times of steps and results in `costs`."""
    waiting = costs.result if steps_ahead else 0.0
    if asks_worker:
        waiting += _ASKING_SECONDS
    return DraftCosts(waiting / costs.step, costs.draft / costs.step, costs.row / costs.step)


def _ngram_drafters(config: SpeculativeConfig) -> MakeDrafter:
    return lambda cache_salt: NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)


def _suffix_drafters(config: SpeculativeConfig) -> MakeDrafter:
    outputs = SaltedOutputs(config.prompt_lookup_min)
    return lambda cache_salt: SuffixDrafter(outputs.of(cache_salt), config.prompt_lookup_min, _SUFFIX_LONGEST)


DRAFTERS: dict[str, Callable[[SpeculativeConfig], MakeDrafter]] = {
    "ngram": _ngram_drafters,
    "suffix": _suffix_drafters,
}
