"""One replica's queries to its draft worker: one step at a time, with short waits only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from sempre.engine.scheduling.planned_step import check_drafts
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import Ask, Incarnation, Speculation
from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import DraftRequest, ExecuteStep, StepResult

# how long a request waits; a slower worker is late, and gets no query until its answer is there
PATIENCE_S = 0.5


class DraftLink:
    """Takes requests that want drafts and the worker's results; returns what to send.

    A request only waits for its own `Ask`, which expires by itself: anything forgotten here only costs drafts.
    """

    def __init__(self) -> None:
        self._worker: Incarnation | None = None
        self._vocab_size = 0
        self._next_id = 0
        self._known: dict[str, int] = {}
        """number of tokens that the worker has, by request"""
        self._finished: list[str] = []
        self._wanting: list[Request] = []
        self._queued: list[tuple[Request, Ask]] = []
        self._step: ExecuteStep | None = None
        """in flight, for `_asked`"""
        self._asked: list[Ask] = []
        self._sent_at = 0.0

    def begin(self, vocab_size: int) -> None:
        """A worker starts serving, without any requests yet."""
        self.end()
        self._worker, self._vocab_size = Incarnation(), vocab_size

    def end(self) -> None:
        """The worker is gone, and no request waits for it any more."""
        if self._worker is not None:
            self._worker.is_gone = True
        self._worker = self._step = None
        for forgotten in (self._known, self._finished, self._queued, self._asked):
            forgotten.clear()

    def is_late(self, now: float) -> bool:
        return self._step is not None and now >= self._sent_at + PATIENCE_S

    def ask(self, requests: Sequence[Request]) -> None:
        """Add requests that want drafts."""
        self._wanting += requests

    def forget(self, request_id: str) -> None:
        if self._known.pop(request_id, None) is not None:
            self._finished.append(request_id)

    def next_step(self, now: float) -> ExecuteStep | None:
        """The step to send, if any. Requests that want drafts wait from now on, unless the worker is late or gone."""
        wanting, self._wanting = self._wanting, []
        worker, deadline = self._worker, now + PATIENCE_S
        if worker is None or self.is_late(now):
            worker, deadline = Incarnation(), now
        for request in wanting:
            speculation = _speculation(request)
            if request.finish_reason is None and (num_drafts := speculation.num_to_ask()):
                speculation.ask = ask = Ask(len(request.token_ids), num_drafts, deadline, worker)
                if ask.is_open(now):
                    self._queued.append((request, ask))
        if self._step is not None or not self._queued:
            return None
        queued, self._queued = self._queued, []
        # a request that was recomputed meanwhile has a new query or none
        open_asks = [(request, ask) for request, ask in queued if ask.is_open(now) and _speculation(request).ask is ask]
        if not open_asks:
            return None
        new_requests = [request.as_new() for request, _ in open_asks if request.request_id not in self._known]
        drafts = [self._draft_request(request, ask) for request, ask in open_asks]
        finished, self._finished = self._finished, []
        self._asked, self._sent_at = [ask for _, ask in open_asks], now
        self._next_id += 1
        self._step = ExecuteStep(
            step_id=self._next_id, finished_request_ids=finished, new_requests=new_requests, drafts=drafts
        )
        return self._step

    def take(self, result: StepResult) -> None:
        """Fill in the answers; late ones are harmless. Raises ProtocolError if the result is wrong."""
        step = self._step
        if step is None or result.step_id != step.step_id:
            expected = "none" if step is None else step.step_id
            raise ProtocolError(f"StepResult.step_id: expected {expected}, found {result.step_id}")
        check_drafts(step, result)
        highest = max(chain.from_iterable(result.drafts), default=0)
        if highest >= self._vocab_size:
            raise ProtocolError(f"StepResult.drafts: expected ids less than {self._vocab_size}, found {highest}")
        for ask, drafts in zip(self._asked, result.drafts, strict=True):
            ask.answer = drafts
        self._step, self._asked = None, []

    def next_deadline(self, now: float) -> float | None:
        """When the first waiting request continues without drafts."""
        asks = chain(self._asked, (ask for _, ask in self._queued))
        return next((ask.deadline for ask in asks if ask.is_open(now)), None)

    def _draft_request(self, request: Request, ask: Ask) -> DraftRequest:
        known = self._known.get(request.request_id, ask.num_known)
        self._known[request.request_id] = ask.num_known
        return DraftRequest(
            request_id=request.request_id, token_ids=request.token_ids[known:], num_drafts=ask.num_drafts
        )


def _speculation(request: Request) -> Speculation:
    assert request.speculation is not None
    return request.speculation
