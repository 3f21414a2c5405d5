"""Which request crashed the worker? After a crash the requests in flight run alone, one after the other.

A request passes once it has as many new tokens as it had steps in flight at the crash. It then waits for the others
at its place in the order. A request in flight in too many crashes before it passes fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sempre.engine.scheduling.planned_step import PlannedStep
from sempre.engine.scheduling.request import Request
from sempre.ipc.errors import RequestCrashed


@dataclass(slots=True)
class _Suspect:
    request: Request
    num_crashes: int = 0
    passes_at: int = 0
    """length of its sequence, in tokens, at which it passes"""


class CrashIsolation:
    """The suspects of recent crashes; the one with the fewest crashes runs first, then by the order of requests."""

    def __init__(self, max_request_crashes: int) -> None:
        self._max_request_crashes = max_request_crashes
        self._suspects: dict[str, _Suspect] = {}

    def __bool__(self) -> bool:
        return bool(self._suspects)

    @property
    def current(self) -> Request | None:
        """The suspect that runs alone now; None when all have passed."""
        if not self._suspects:
            return None
        first = min(self._suspects.values(), key=lambda suspect: (suspect.num_crashes, suspect.request.order_key))
        return first.request

    def note_crash(self, in_flight: Iterable[PlannedStep]) -> list[tuple[Request, int]]:
        """Suspect the unfinished requests of these steps; return those to fail, with their number of crashes."""
        requests = [request for step in in_flight for request in step.requests]
        at_work = [request for request in requests if request.finish_reason is None and not request.is_paused]
        num_steps = Counter(request.request_id for request in at_work)
        for request in at_work:
            suspect = self._suspects.setdefault(request.request_id, _Suspect(request))
            suspect.passes_at = len(request.token_ids) + num_steps[request.request_id]
        for request_id in num_steps:
            self._suspects[request_id].num_crashes += 1
        guilty = [s for s in self._suspects.values() if s.num_crashes >= self._max_request_crashes]
        for suspect in guilty:
            self.release(suspect.request)
        return [(suspect.request, suspect.num_crashes) for suspect in guilty]

    def has_passed(self, request: Request) -> bool:
        """Whether this suspect has passed the point of the crash."""
        suspect = self._suspects.get(request.request_id)
        return suspect is not None and len(request.token_ids) >= suspect.passes_at

    def release(self, request: Request) -> None:
        """Stop suspecting a request: it has passed, ended or failed. Other requests are ignored."""
        self._suspects.pop(request.request_id, None)


def crashed(request: Request, num_crashes: int, cause: str) -> RequestCrashed:
    """The error of a request that is given up after so many crashes, the last from `cause`."""
    return RequestCrashed(
        f"Request {request.request_id!r} was being computed in {num_crashes} crashes of its worker, the last: "
        f"{cause}. It is not retried (max_request_crashes).",
        request_id=request.request_id,
        num_crashes=num_crashes,
    )
