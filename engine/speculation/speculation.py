"""One request's drafts as the scheduler asks for them, and the plan that makes such objects for all requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sempre.engine.speculation.lookup import Drafter, NgramDrafter, SaltedOutputs, SuffixDrafter
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import StepCosts

_START = 0.7
_WEIGHT = 1 / 8
_SUFFIX_LONGEST = 24
# A draft model that was given up is asked again after this many tokens, and after twice as many each time in vain.
_REST = 32
_PROBE_LENGTH = 2
# the way to a draft worker and back
_ASKING_SECONDS = 0.3e-3
MakeDrafter = Callable[[str | None], Drafter]
"""Makes the drafter of one request from its `cache_salt`."""


class DraftCosts(NamedTuple):
    """In steps of the target."""

    first: float
    """what a step with drafts costs more, however many: the next one is not planned before its result is known"""
    each: float
    """a draft token and its row in the step"""


class DraftLength:
    """At most `longest`; 0 while steps without drafts bring more tokens in the same time.

    With a share r of accepted draft tokens, weighted towards the last of them, a step with k of them brings
    1 + r + … + r^k tokens (Leviathan et al., arXiv:2211.17192, section 3.1, if they are independent) and costs
    1 + first + k · each.
    """

    def __init__(self, longest: int, *, costs: DraftCosts, adaptive: bool = True) -> None:
        self._longest = longest
        self._costs = costs
        self.adapts = adaptive
        self._rate = _START
        self.current = longest if not adaptive else self._length()

    def observe(self, num_accepted: int, *, missed: bool) -> None:
        """So many draft tokens in a row were right; the one after them was wrong if `missed`."""
        if not self.adapts:
            return
        for _ in range(num_accepted):
            self._rate += (1.0 - self._rate) * _WEIGHT
        if missed:
            self._rate -= self._rate * _WEIGHT
        self.current = self._length()

    def _length(self) -> int:
        best, best_speed = 0, 1.0
        tokens, kept, cost = 1.0, 1.0, 1.0 + self._costs.first
        for length in range(1, self._longest + 1):
            kept *= self._rate
            tokens += kept
            cost += self._costs.each
            if tokens / cost > best_speed:
                best, best_speed = length, tokens / cost
        return best


class Incarnation:
    """One draft worker, until it is gone; the one that is started in its place is another."""

    is_gone = False


@dataclass(slots=True)
class Ask:
    """What a draft worker has been asked for one request, which waits while this is open.

    Nobody has to end that wait: it ends at the deadline, if neither the answer nor the end of the worker comes first.
    """

    num_known: int
    """tokens of the request; the drafts follow them"""
    num_drafts: int
    deadline: float
    worker: Incarnation
    answer: list[int] | None = None

    def is_open(self, now: float) -> bool:
        return self.answer is None and now < self.deadline and not self.worker.is_gone


class Speculation(Protocol):
    """One request's drafts. `token_ids` is its sequence as far as results have come back."""

    ask: Ask | None
    """what a draft worker was asked after the last result"""

    def must_wait(self, token_ids: list[int], num_in_flight: int) -> bool:
        """Whether the result of a step in flight decides what the next one computes."""

    def drafts(self, token_ids: list[int], room: int) -> list[int]:
        """Draft tokens to verify with the step that computes the last token; at most `room`, which may be 0."""

    def num_wanted(self) -> int:
        """Draft tokens that the worker is to make after that step."""

    def num_to_ask(self) -> int:
        """Draft tokens to ask a draft worker for, now that a result is back."""

    def sampled(self, token_ids: list[int], drafts: list[int], num_kept: int, drafted: list[int] | None) -> None:
        """A step has returned that verified `drafts` and kept `num_kept`; the worker then `drafted` what comes next,
        None where it was not asked to."""

    def ended(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """The request has ended, in whatever way."""


class LookupSpeculation:
    """Drafts of a drafter in this process.

    Every token that comes is compared with the last draft, whether it was verified or not, so it costs nothing to
    notice when drafts become worth while.
    """

    def __init__(self, drafter: Drafter, length: DraftLength, longest: int) -> None:
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
        # one more than can be verified: a step may be in flight
        self._drafts = self._drafter.propose(self._longest + 1)


class ModelSpeculation:
    """Drafts of a draft model; `asks_worker`: it has a worker of its own, which is asked once a result is back."""

    def __init__(self, length: DraftLength, longest: int, *, asks_worker: bool) -> None:
        self.ask: Ask | None = None
        self._length = length
        self._probe_length = min(longest, _PROBE_LENGTH)
        self._asks_worker = asks_worker
        self._drafts: list[int] = []
        self._num_known = -1
        self._rest = 0  # tokens before the draft model is asked again
        self._next_rest = _REST
        self._in_flight = False  # a step whose result decides about drafts
        if length.current == 0:
            self._begin_rest()

    def must_wait(self, token_ids: list[int], num_in_flight: int) -> bool:
        return num_in_flight > 0 and (self._in_flight or self.num_to_ask() > 0)

    def drafts(self, token_ids: list[int], room: int) -> list[int]:
        if self.ask is not None:
            self._take_answer(self.ask)
        drafts = self._drafts[:room] if self._num_known == len(token_ids) else []
        self._in_flight = bool(drafts)
        return drafts

    def num_wanted(self) -> int:
        # the drafts of a probe are verified before more are asked for
        if self._asks_worker or (self._length.current == 0 and self._in_flight):
            return 0
        count = self._num_worth()
        self._in_flight = self._in_flight or count > 0
        return count

    def num_to_ask(self) -> int:
        return self._num_worth() if self._asks_worker else 0

    def sampled(self, token_ids: list[int], drafts: list[int], num_kept: int, drafted: list[int] | None) -> None:
        self.ask = None  # it was about a shorter sequence
        self._rest = max(0, self._rest - 1)
        if drafts:
            self._length.observe(num_kept, missed=num_kept < len(drafts))
            if self._length.current > 0:
                self._next_rest = _REST
            else:
                self._begin_rest()
        elif drafted == []:
            self._begin_rest()
        if drafts or drafted is not None:
            self._in_flight = False
        self._drafts, self._num_known = drafted or [], len(token_ids)

    def ended(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        self.ask = None

    def _num_worth(self) -> int:
        """How many draft tokens are worth asking for."""
        return 0 if self._rest else self._length.current or self._probe_length

    def _take_answer(self, ask: Ask) -> None:
        """The request goes on, with what its draft worker has answered or without; what comes later is too late."""
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
        """`steps_ahead`: the worker takes a step before the result of the one before it is known. `costs`: expected of
        the target, and of a draft model, wherever it is."""
        self._config = config
        self._costs = draft_costs(costs, steps_ahead=steps_ahead, asks_worker=self.asks_worker)
        self._make_drafter = DRAFTERS[config.method](config) if config.method in DRAFTERS else None

    @property
    def asks_worker(self) -> bool:
        return self._config.placement == "worker"

    def start(self, cache_salt: str | None = None) -> Speculation:
        """Drafts for a request; none come from outputs of requests with another `cache_salt`."""
        config = self._config
        longest = config.num_speculative_tokens
        length = DraftLength(longest, costs=self._costs, adaptive=config.adaptive)
        if self._make_drafter is None:
            return ModelSpeculation(length, longest, asks_worker=self.asks_worker)
        return LookupSpeculation(self._make_drafter(cache_salt), length, longest)


def draft_costs(costs: StepCosts, *, steps_ahead: bool, asks_worker: bool) -> DraftCosts:
    """What drafts cost where steps and results take as long as `costs` says."""
    waiting = costs.result if steps_ahead else 0.0
    if asks_worker:
        waiting += _ASKING_SECONDS
    return DraftCosts(first=waiting / costs.step, each=(costs.row + costs.draft) / costs.step)


def _ngram_drafters(config: SpeculativeConfig) -> MakeDrafter:
    return lambda cache_salt: NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)


def _suffix_drafters(config: SpeculativeConfig) -> MakeDrafter:
    outputs = SaltedOutputs(config.prompt_lookup_min)
    return lambda cache_salt: SuffixDrafter(outputs.of(cache_salt), config.prompt_lookup_min, _SUFFIX_LONGEST)


DRAFTERS: dict[str, Callable[[SpeculativeConfig], MakeDrafter]] = {
    "ngram": _ngram_drafters,
    "suffix": _suffix_drafters,
}
