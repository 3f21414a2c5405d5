"""What one replica asks of its draft worker: one proposal at a time, and never longer than a moment.

A request that awaits guesses is not planned, so each of them has a place here, in one of two lists, from `ask` on until
it is answered or given up: what waits to be asked, and what the proposal under way is for. If the worker is not there,
or late, both are emptied, and its requests go on without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sempre.engine.scheduling.planned_step import check_drafts
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import ModelSpeculation
from sempre.ipc.messages import DraftRequest, ExecuteStep, StepResult

# a proposal that takes longer is not waited for, and no other one until it is there
PATIENCE_S = 0.5


class DraftLink:
    """Fed with requests that await guesses and with the worker's answers; says what to send."""

    def __init__(self) -> None:
        self._next_id = 0
        self._known: dict[str, int] = {}
        """tokens that the worker has been told, by request"""
        self._finished: list[str] = []
        self._queued: dict[str, Request] = {}
        """what is to be asked about, by id: one that is computed again meanwhile asks twice"""
        self._asked: list[tuple[Request, int]] = []
        """what the proposal under way is for, with the number of tokens that it goes by"""
        self._step = ExecuteStep(step_id=0)
        self._asked_at: float | None = None
        self.is_late = False

    def ask(self, requests: Sequence[Request]) -> None:
        """These await guesses."""
        self._queued.update((request.request_id, request) for request in requests)

    def owns(self, request: Request) -> bool:
        """Whether what `request` awaits is certain to come, or to be given up."""
        asked = not self.is_late and any(request is other for other, _ in self._asked)
        return asked or self._queued.get(request.request_id) is request

    def forget(self, request_id: str) -> None:
        if self._known.pop(request_id, None) is not None:
            self._finished.append(request_id)

    def next_step(self, now: float, *, available: bool) -> ExecuteStep | None:
        """What to send, if anything. While the worker is not available or late, nobody is kept waiting."""
        if not available or self.is_late:
            self._give_up_queued()
            return None
        if self._asked_at is not None or not self._queued:
            return None
        queued, self._queued = self._queued, {}
        new_requests, drafts = [], []
        for request in queued.values():
            speculation = _speculation(request)
            if request.finish_reason is not None or not speculation.awaits_worker:
                continue
            known = self._known.get(request.request_id)
            if known is None:
                new_requests.append(request.as_new())
                known = len(request.token_ids)
            self._known[request.request_id] = len(request.token_ids)
            drafts.append(
                DraftRequest(
                    request_id=request.request_id, token_ids=request.token_ids[known:], num_drafts=speculation.length()
                )
            )
            self._asked.append((request, len(request.token_ids)))
        if not drafts:
            return None
        finished, self._finished = self._finished, []
        self._asked_at = now
        self._next_id += 1
        self._step = ExecuteStep(
            step_id=self._next_id, finished_request_ids=finished, new_requests=new_requests, drafts=drafts
        )
        return self._step

    def take(self, result: StepResult) -> None:
        """Hand out the drafts; those that come too late do no harm. Raises ProtocolError when some are missing."""
        check_drafts(self._step, result)
        asked, self._asked = self._asked, []
        self._asked_at = None
        self.is_late = False
        for (request, num_known), guesses in zip(asked, result.drafts, strict=True):
            if request.finish_reason is None and len(request.token_ids) == num_known:
                _speculation(request).answered(num_known, guesses)

    def check_late(self, now: float) -> bool:
        """Whether the proposal under way has just become late; its requests, and all others, then go on without it."""
        if self._asked_at is None or self.is_late or now - self._asked_at < PATIENCE_S:
            return False
        self.is_late = True
        self._give_up(request for request, _ in self._asked)
        self._give_up_queued()
        return True

    def reset(self) -> None:
        """The worker is gone; the next one knows nothing."""
        self._give_up(request for request, _ in self._asked)
        self._give_up_queued()
        self._known.clear()
        self._finished.clear()
        self._asked.clear()
        self._asked_at = None
        self.is_late = False

    def _give_up_queued(self) -> None:
        queued, self._queued = self._queued, {}
        self._give_up(queued.values())

    def _give_up(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if _speculation(request).awaits_worker:
                _speculation(request).answered(len(request.token_ids), [])


def _speculation(request: Request) -> ModelSpeculation:
    assert isinstance(request.speculation, ModelSpeculation)
    return request.speculation
