"""After any sequence of faults no request waits forever.

A replica with its scheduler and its link to a draft worker are driven at random: steps of both workers are answered in
time, late, wrongly or never, workers are lost and come back, requests are aborted and preempted. After every action
each wait must have a deadline; at the end all steps of the target, and maybe the draft worker's, are answered, and
every request must have the tokens of an undisturbed run.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from math import inf

import pytest
from scripted_worker import VOCAB_SIZE, next_token

from sempre.engine.coordinator.draft_link import PATIENCE_S, DraftLink
from sempre.engine.coordinator.replica import Replica
from sempre.engine.harness import make_request
from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import ProtocolError, SempreError
from sempre.ipc.messages import (
    ExecuteStep,
    RequestOutputDelta,
    SampledTokens,
    ScheduledRequest,
    StepCosts,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerHealth,
)


class Steps:
    """An executor that keeps the steps it is sent."""

    world_size = 1

    def __init__(self) -> None:
        self.sent: deque[ExecuteStep] = deque()

    def send(self, rank: int, command: WorkerCommand) -> None:
        assert isinstance(command, ExecuteStep)
        self.sent.append(command)

    def receive(self) -> tuple[int, WorkerEvent] | None:
        raise NotImplementedError

    def blame(self, rank: int, error: ProtocolError) -> SempreError:
        return error

    def health(self) -> list[WorkerHealth]:
        return []

    def shutdown(self) -> None:
        self.sent.clear()


class Run:
    """One replica, its requests' tokens so far, and the random actions on it."""

    def __init__(self, seed: int, *, adaptive: bool, depth: int) -> None:
        self.drawn = random.Random(seed)
        config = SpeculativeConfig(
            method="draft_model", model="m", placement="worker", num_speculative_tokens=3, adaptive=adaptive
        )
        costs = StepCosts(step=1.0, row=0.0, result=0.0, draft=0.0)
        plan = SpeculationPlan(config, steps_ahead=depth > 1, costs=costs)
        limits = Limits(
            num_blocks=14,  # too few for all, so that requests are preempted
            block_size=4,
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_draft_tokens=12,
        )
        self.scheduler = Scheduler(
            limits,
            policy="fcfs",
            enable_prefix_caching=True,
            max_request_crashes=10_000,
            speculation=plan,
        )
        self.link = DraftLink()
        self.steps = Steps()
        self.replica = Replica(range(1), self.scheduler, self.steps, self.link, max_steps_in_flight=depth)
        self.now = 0.0
        self.link.begin(VOCAB_SIZE)
        self.asked: ExecuteStep | None = None
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.num_acts: Counter[str] = Counter()
        self._sequences: dict[str, list[int]] = {}  # as the worker knows them

    def add(self) -> None:
        number = len(self.tokens)
        prompt = [self.drawn.randrange(1000) for _ in range(self.drawn.randint(1, 20))]
        spec = make_request(prompt, ordinal=number, seed=number, max_tokens=self.drawn.randint(1, 24))
        self.tokens[spec.request_id] = []
        self.replica.add(spec)

    def advance(self) -> None:
        self.replica.advance(self.now)

    def answer_step(self) -> None:
        if self.steps.sent:
            step = self.steps.sent.popleft()
            for new in step.new_requests:
                self._sequences[new.request_id] = [*new.token_ids]
            sampled = [self._computed(item) for item in step.scheduled]
            self._take(self.replica.take(0, StepResult(rank=0, step_id=step.step_id, sampled=sampled)))

    def ask(self) -> None:
        step = self.link.next_step(self.now)
        if step is not None:
            assert self.asked is None, "one step at a time"
            names = [item.request_id for item in step.drafts]
            assert len(names) == len(set(names)), "asked twice about one request"
            self.asked = step

    def answer_drafts(self) -> None:
        if self.asked is not None:
            step, self.asked = self.asked, None
            drafts = [self.drawn.choices(range(1000), k=self.drawn.randint(0, item.num_drafts)) for item in step.drafts]
            self.link.take(StepResult(rank=0, step_id=step.step_id, drafts=drafts))

    def answer_wrongly(self) -> None:
        """The draft worker is then ended."""
        if self.asked is not None:
            step, count = self.asked, len(self.asked.drafts)
            wrong: list[tuple[int, list[list[int]]]] = [
                (0, []),
                (0, [[5]] * (count + 1)),
                (0, [[5] * 4] * count),
                (0, [[VOCAB_SIZE]] * count),
                (-1, [[5]] * count),
            ]
            older, drafts = self.drawn.choice(wrong)
            with pytest.raises(ProtocolError, match=r"StepResult\.(drafts|step_id): expected"):
                self.link.take(StepResult(rank=0, step_id=step.step_id + older, drafts=drafts))
            self.lose_draft_worker()

    def pass_time(self) -> None:
        self.now += self.drawn.choice([0.1, PATIENCE_S, 3.0])

    def lose_draft_worker(self) -> None:
        self.link.end()
        self.asked = None
        if self.drawn.random() < 0.5:
            self.get_draft_worker()

    def get_draft_worker(self) -> None:
        if self.link._worker is None:
            self.link.begin(VOCAB_SIZE)

    def lose_worker(self) -> None:
        self.steps.sent.clear()
        self._sequences.clear()
        self._take(self.replica.lose_workers("it was told to"))

    def get_worker(self) -> None:
        self.replica.resume()

    def abort(self) -> None:
        unfinished = [name for name in self.tokens if name not in self.ended]
        if unfinished:
            name = self.drawn.choice(unfinished)
            self.replica.abort(name, "abort")
            self.ended[name] = "abort"

    ACTS = (
        (add, 3), (advance, 12), (answer_step, 10), (ask, 12), (answer_drafts, 6), (answer_wrongly, 1),
        (pass_time, 3), (lose_draft_worker, 1), (get_draft_worker, 2), (lose_worker, 1), (get_worker, 2), (abort, 1),
    )  # fmt: skip

    def act(self) -> None:
        acts, weights = zip(*self.ACTS, strict=True)
        (act,) = self.drawn.choices(acts, weights)
        self.num_acts[act.__name__] += 1
        act(self)
        self.scheduler.check_invariants()
        self.check_waits()

    def check_waits(self) -> None:
        """Whatever a request waits for: a step under way will be answered or lost, and a draft worker has its time."""
        in_flight = Counter(item.request_id for step in self.steps.sent for item in step.scheduled)
        with_drafts = {item.request_id for step in self.steps.sent for item in step.scheduled if item.draft_token_ids}
        for request in self.scheduler._requests.values():
            assert request.num_tokens - len(request.token_ids) <= in_flight[request.request_id], "a lost token"
            assert not request.drafts_in_flight or request.request_id in with_drafts, "lost drafts"
            deadline = self.deadline(request)
            assert deadline is None or self.now < deadline <= self.now + PATIENCE_S, "a wait without an end"

    def deadline(self, request: Request) -> float | None:
        """Until when it waits for its draft worker."""
        assert request.speculation is not None
        ask = request.speculation.ask
        return ask.deadline if ask is not None and ask.is_open(self.now) else None

    def finish(self, *, draft_worker_answers: bool) -> None:
        """From now on every step of the target is answered."""
        self.get_worker()
        for _ in range(2000):
            if not self.scheduler.has_unfinished():
                return
            for act in (self.ask, self.advance, self.answer_step):
                act()
            if draft_worker_answers:
                self.answer_drafts()
            elif not self.steps.sent:
                self.now += PATIENCE_S / 4
        raise AssertionError(f"{self.scheduler.num_unfinished} requests hang")

    def _computed(self, item: ScheduledRequest) -> SampledTokens:
        """As a worker answers: its own token after the last one it knows, and after each draft that equals its own."""
        sequence = self._sequences[item.request_id]
        if item.num_computed_tokens + item.num_tokens < len(sequence):
            return SampledTokens(request_id=item.request_id)
        sampled: list[int] = []
        for draft in [*item.draft_token_ids, None]:
            token = next_token(int(item.request_id), sequence)
            sampled.append(token)
            sequence.append(token)
            if token != draft:
                break
        return SampledTokens(request_id=item.request_id, token_ids=sampled)

    def _take(self, deltas: list[RequestOutputDelta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ended, "an output after the end"
            self.tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ended[delta.request_id] = delta.finish_reason


def undisturbed(seed: int, prompt: list[int], count: int) -> list[int]:
    sequence = [*prompt]
    for _ in range(count):
        sequence.append(next_token(seed, sequence))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_wait_has_an_end(adaptive: bool, depth: int) -> None:
    acts: Counter[str] = Counter()
    for seed in range(25):
        run = Run(seed, adaptive=adaptive, depth=depth)
        prompts: dict[str, list[int]] = {}
        for _ in range(250):
            run.act()
            for name, request in run.scheduler._requests.items():
                prompts.setdefault(name, request.spec.prompt_token_ids)
        run.finish(draft_worker_answers=seed % 2 == 0)
        acts += run.num_acts
        assert run.ended.keys() == run.tokens.keys()
        for name, prompt in prompts.items():
            assert run.tokens[name] == undisturbed(int(name), prompt, len(run.tokens[name]))
            assert run.ended[name] in ("length", "abort")
    assert len(acts) == len(Run.ACTS)


def test_a_wait_without_an_end_is_noticed() -> None:
    """The control: deadlines that never end."""
    run = Run(0, adaptive=False, depth=1)
    run.add()
    while not (
        asks := [request.speculation.ask for request in run.scheduler._requests.values() if run.deadline(request)]
    ):
        for act in (run.ask, run.advance, run.answer_step):
            act()
        if not run.scheduler.has_unfinished():
            run.add()
    run.check_waits()
    for ask in asks:
        ask.deadline = inf
    with pytest.raises(AssertionError, match="a wait without an end"):
        run.check_waits()
    with pytest.raises(AssertionError, match="hang"):
        run.finish(draft_worker_answers=False)
