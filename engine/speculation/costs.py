"""What drafts cost and what they bring, measured over all requests of a replica; and how many are worth it.

Costs are in steps without drafts of as many requests. The expected ones, from the model and the kind of device, hold
until steps have been timed; then all of them are multiplied by one factor, the ratio of what drafts have really cost to
what was expected. Beside that estimate the balance of time spent and tokens gained is kept: when it falls too low,
nobody drafts for a while. No clock here: whoever has one tells when a step was answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import NamedTuple

from sempre.ipc.messages import ExecuteStep, SampledTokens

# acceptance before anything is known
_START = 0.7
# weight of a draft token in a request's acceptance rate, and of a step in the share of requests that have drafts
_WEIGHT = 1 / 8
# drafts must promise this much more than none, to begin with them and to go on
_BEGIN, _KEEP = 1.05, 1.01
# steps of a kind to time before they count, and to remember
_LEAST_TIMED, _REMEMBERED = 3, 16
# after so many steps with drafts, steps without are timed anew: contexts have grown
_REFRESH = 512
# steps that drafts may lose before they pause, and that gains are remembered for; and more for each standard deviation
# of steps without
_CREDIT, _CREDIT_PER_SPREAD = 3.0, 8.0
# steps between trials until it is known what drafts cost
_FIRST_TRIAL = 8
# a pause, in steps: at least, and for each lost step; twice as long after each trial that fails
_LEAST_PAUSE, _PAUSE_PER_LOSS = 128, 128
_LONGEST_PAUSE = 8192
# a step counts as at most this many others: the machine did something else; and the first of its kind not at all if it
# takes longer than so many: a graph was captured
_LONGEST, _LONGEST_FIRST = 4.0, 10.0
# most draft tokens of a request in a trial, and before it is known what they cost
_TRIAL_LENGTH = 2
# a row costs something, whatever is expected
_LEAST_ROW = 0.002


class DraftCosts(NamedTuple):
    """Costs in steps of the target; all requests of a step bear them, since its result comes that much later."""

    first: float
    """of any drafts: the next step is not planned before its result is known"""
    draft: float
    """of each draft token of the request with the most"""
    row: float
    """of each draft token that is verified"""

    def each(self, num_requests: float) -> float:
        """Of one more draft token for each of so many requests."""
        return self.draft + self.row * num_requests

    def times(self, factor: float) -> DraftCosts:
        """All of them multiplied."""
        return DraftCosts(self.first * factor, self.draft * factor, max(self.row, _LEAST_ROW) * factor)

    def of_step(self, lengths: Sequence[int]) -> float:
        """Of a step in which some requests have so many draft tokens."""
        return self.first + self.draft * max(lengths) + max(self.row, _LEAST_ROW) * sum(lengths)


def best_length(rate: float, longest: int, cost: float, each: float) -> tuple[int, float]:
    """The number of draft tokens up to `longest` with the most tokens per time, and that speed.

    With an acceptance rate r, k draft tokens yield 1 + r + … + r^k tokens (Leviathan et al., arXiv:2211.17192, section
    3.1, if they are independent); they take `cost` + k · `each` steps.
    """
    best, best_speed = 0, 1.0 / cost
    tokens, kept = 1.0, 1.0
    for length in range(1, longest + 1):
        kept *= rate
        tokens += kept
        cost += each
        if tokens / cost > best_speed:
            best, best_speed = length, tokens / cost
    return best, best_speed


class _Timed(NamedTuple):
    """A step that only decodes and verifies, as it went."""

    lengths: list[int]
    """draft tokens of each request that has any, verified in this step or made after it"""
    waited: list[float]
    """seconds from a request's last result to this one, where both are known"""
    num_tokens: float
    """tokens of a request, on average"""
    num_requests: int
    shape: tuple[int, int, int]
    """steps of one shape run the same graph"""


@dataclass
class _Load:
    """Steps of about as many requests."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """seconds of steps without drafts"""
    factors: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """what drafts cost, as a multiple of what was expected"""
    num_drafting: int = 0

    @property
    def plain_seconds(self) -> float | None:
        return fmean(self._counted()) if len(self.plain) >= _LEAST_TIMED else None

    @property
    def credit(self) -> float:
        """Steps that drafts may lose."""
        counted = self._counted()
        return _CREDIT + _CREDIT_PER_SPREAD * pstdev(counted) / fmean(counted)

    @property
    def factor(self) -> float | None:
        return max(0.0, median(self.factors)) if len(self.factors) >= _LEAST_TIMED else None

    def _counted(self) -> list[float]:
        most = _LONGEST * median(self.plain)
        return [min(seconds, most) for seconds in self.plain]


class DraftMeter:
    """Times steps with and without drafts, counts accepted drafts, and decides whether there are drafts at all.

    That is one decision for all requests, since all of them bear the costs; each request then has as many as pay.
    """

    def __init__(self, expected: DraftCosts, longest: int) -> None:
        """`longest`: most draft tokens of a request."""
        self.rate = _START
        """share of right drafts, weighted towards recent ones of all requests"""
        self.num_requests = 1
        """in the last step"""
        self._expected = self._costs = expected
        self._longest = longest
        self._loads: dict[int, _Load] = {}
        self._is_measured = False
        self._shapes: set[tuple[int, int, int]] = set()
        self._answered: dict[str, float] = {}
        self._after_plain = False
        self._num_steps = 0
        self._share = 1.0  # of requests that have drafts, while some do
        self._lost = 0.0  # steps lost in drafting, less those gained
        self._num_failed = 0
        self._try_at = _FIRST_TRIAL
        self._is_paused = False
        self._is_held = False  # paused, or until steps without drafts have been timed
        self._pays = self._is_decided = False

    @property
    def costs(self) -> DraftCosts | None:
        """Now; None: no drafts for anybody, except in a trial."""
        if self._is_held:
            return None
        if not self._is_decided:
            self._decide()
        return self._costs if self._pays else None

    @property
    def longest(self) -> int:
        """Most draft tokens of a request: few, until it is known what they cost."""
        return self._longest if self._is_measured or not self._num_steps else min(self._longest, _TRIAL_LENGTH)

    @property
    def trial_length(self) -> int:
        """Draft tokens of each request although they do not seem to pay: once in a long while, and 0 where even right
        ones would not."""
        if self._num_steps < self._try_at or self._is_held:
            return 0
        each = self._costs.each(self.num_requests)
        speed = best_length(1.0, self._longest, 1.0 + self._costs.first, each)[1]
        return min(self._longest, _TRIAL_LENGTH) if speed > _BEGIN or not self._is_measured else 0

    def observe(self, step: ExecuteStep, sampled: Sequence[SampledTokens], now: float) -> None:
        """The step was answered `now`, seconds of a steady clock. Steps with prompts are not counted."""
        self._num_steps += 1
        self._is_decided = False
        lengths = _draft_lengths(step)
        if lengths:  # the next trial, if this was one
            pause = _LEAST_PAUSE if self._is_measured else _FIRST_TRIAL
            self._try_at = max(self._try_at, self._num_steps + pause)
        timed = self._timed(step, sampled, lengths, now)
        if timed is None:
            return
        self.num_requests = timed.num_requests
        load = self._loads.setdefault(_bucket(timed.num_requests), _Load())
        if timed.lengths:
            self._take_drafting(load, timed)
        elif self._after_plain and timed.waited:  # a step after one with drafts was planned late
            load.plain.append(median(timed.waited))
        self._after_plain = not timed.lengths
        # what was measured with another number of requests holds until there is better, but does not rule out trials
        self._is_measured = load.factor is not None
        if load.factor is not None:
            self._costs = self._expected.times(load.factor)
        self._is_paused = self._is_paused and self._num_steps < self._try_at
        self._is_held = self._is_paused or load.plain_seconds is None

    def count(self, *, right: bool) -> None:
        """A draft token of any request was right or wrong."""
        self.rate += (right - self.rate) * _WEIGHT / self.num_requests
        self._is_decided = False

    def forget_times(self) -> None:
        """What comes next is not comparable with the results so far."""
        self._answered.clear()
        self._after_plain = False

    def _decide(self) -> None:
        costs, share = self._costs, self._share
        each = costs.each(self.num_requests * share)
        length, _ = best_length(self.rate, self.longest, 1.0 + costs.first, each)
        # only those who have drafts gain
        gained = share * sum(self.rate**at for at in range(1, length + 1))
        speed = (1.0 + gained) / (1.0 + costs.first + length * each)
        self._pays = length > 0 and speed > (_KEEP if self._pays else _BEGIN)
        self._is_decided = True

    def _timed(
        self, step: ExecuteStep, sampled: Sequence[SampledTokens], lengths: list[int], now: float
    ) -> _Timed | None:
        for request_id in step.finished_request_ids:
            self._answered.pop(request_id, None)
        if not step.scheduled or any(item.num_tokens != 1 + len(item.draft_token_ids) for item in step.scheduled):
            self.forget_times()
            return None
        ids = [item.request_id for item in step.scheduled]
        # from result to result: the time that a request waited for its drafts is a cost of theirs
        waited = [now - self._answered[request_id] for request_id in ids if request_id in self._answered]
        self._answered.update(dict.fromkeys(ids, now))
        num_tokens = sum(len(result.token_ids) for result in sampled) / len(ids)
        num_rows = sum(item.num_tokens for item in step.scheduled)
        num_made = max((item.num_drafts for item in step.drafts), default=0)
        shape = (_bucket(len(ids)), _bucket(num_rows), num_made)
        return _Timed(lengths, waited, num_tokens, len(ids), shape)

    def _take_drafting(self, load: _Load, timed: _Timed) -> None:
        plain = load.plain_seconds
        if plain is not None and timed.waited:
            steps = fmean(timed.waited) / plain
            if timed.shape in self._shapes or steps <= _LONGEST_FIRST:
                load.factors.append((steps - 1.0) / self._expected.of_step(timed.lengths))
                self._lost = max(self._lost + min(steps, _LONGEST) - timed.num_tokens, -load.credit)
                if self._lost > load.credit:
                    self._pause()
                elif self._lost < 0.0:
                    self._num_failed = 0
        self._shapes.add(timed.shape)
        self._share += (len(timed.lengths) / timed.num_requests - self._share) * _WEIGHT
        load.num_drafting += 1
        if load.num_drafting % _REFRESH == 0:
            load.plain.clear()

    def _pause(self) -> None:
        pause = max(_LEAST_PAUSE, self._lost * _PAUSE_PER_LOSS) * 2**self._num_failed
        self._try_at = self._num_steps + int(min(pause, _LONGEST_PAUSE))
        self._num_failed += 1
        self._lost = 0.0
        self._is_paused = True


class DraftLength:
    """Of one request: at most the longest, 0 while drafts do not pay."""

    adapts = True

    def __init__(self, meter: DraftMeter, *, made_together: bool = False) -> None:
        """`made_together`: the drafts of all requests take as long as the longest, so that requests should have as
        many of them; one request's acceptance counts for as much as it is of the batch."""
        self._meter = meter
        self._made_together = made_together
        self._rate = meter.rate
        self._key: tuple[float, ...] = ()
        self._best = 0

    @property
    def current(self) -> int:
        """Now; that of a trial, if there is one, where drafts do not pay."""
        meter, rate = self._meter, self._rate
        costs = meter.costs
        if costs is None:
            return meter.trial_length
        if self._made_together:
            rate = meter.rate + (rate - meter.rate) / meter.num_requests
        key = (rate, costs.first, costs.each(meter.num_requests), meter.longest)
        if self._key != key:
            self._key, self._best = key, best_length(rate, meter.longest, 1.0 + costs.first, key[2])[0]
        return self._best

    def observe(self, num_accepted: int, *, missed: bool) -> None:
        """Record that `num_accepted` draft tokens in a row were right; the one after them was wrong if `missed`."""
        for right in [True] * num_accepted + [False] * missed:
            self._rate += (right - self._rate) * _WEIGHT
            self._meter.count(right=right)


class FixedLength:
    """A length that does not adapt."""

    adapts = False

    def __init__(self, current: int) -> None:
        self.current = current

    def observe(self, num_accepted: int, *, missed: bool) -> None:
        pass


def _draft_lengths(step: ExecuteStep) -> list[int]:
    made = {item.request_id: item.num_drafts for item in step.drafts}
    lengths = (max(len(item.draft_token_ids), made.get(item.request_id, 0)) for item in step.scheduled)
    return [length for length in lengths if length]


def _bucket(num_requests: int) -> int:
    """Numbers of requests whose steps take about as long are rounded up to the same one: 1, 2, 3, 4, 6, 8, 12, …"""
    power = 1 << (num_requests - 1).bit_length()
    return power * 3 // 4 if num_requests <= power * 3 // 4 else power
