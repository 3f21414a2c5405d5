"""What a coordinator owes: requests with the tokens so far, and calls."""

from __future__ import annotations

from sempre.engine.client.pending_requests import FRAME_BYTES, PendingRequests
from sempre.engine.harness import make_request
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    CallWorkers,
    CallWorkersReply,
    GetMetrics,
    LogprobRows,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    RequestOutputDelta,
    ResumeRequests,
)


def delta(name: str, *token_ids: int, rows: int = 0, end: str | None = None) -> OutputsReady:
    packed = LogprobRows(num_rows=rows, width=1, token_ids=b"", logprobs=b"", ranks=b"") if rows else None
    parts = {"token_ids": list(token_ids), "prompt_logprobs": packed, "finish_reason": end}
    return OutputsReady(outputs=[RequestOutputDelta(request_id=name, **parts)])  # type: ignore[arg-type]


def test_unfinished_requests_go_on_where_they_were() -> None:
    pending = PendingRequests()
    specs = [make_request([1, 2, 3], ordinal=i, seed=i) for i in range(4)]
    pending.sent(AddRequests(requests=specs))
    pending.sent(AddRequests(requests=[make_request([9], ordinal=9, request_id="0")]))
    for event in (delta("0", rows=2), delta("0", 5), delta("1", 6), delta("1", 7, end="stop"), delta("unknown", 1)):
        pending.received(event)
    pending.sent(AbortRequests(request_ids=["2", "unknown"]))
    (command,) = pending.commands()
    assert isinstance(command, AddRequests)
    first, last = command.requests
    assert (first.prompt_token_ids, first.output_token_ids, first.num_prompt_logprobs_delivered) == ([1, 2, 3], [5], 2)
    assert (first.seed, first.ordinal, last) == (0, 0, specs[3])
    assert pending.num_unfinished == 2


def test_paused_requests_stay_paused() -> None:
    pending = PendingRequests()
    pending.sent(AddRequests(requests=[make_request([1], ordinal=i) for i in range(3)]))
    pending.sent(PauseRequests(request_ids=["0", "1", "unknown"]))
    pending.sent(ResumeRequests(request_ids=["0", "2"]))
    added, paused = pending.commands()
    assert isinstance(added, AddRequests)
    assert len(added.requests) == 3
    assert paused == PauseRequests(request_ids=["1"])


def test_calls_without_an_answer_are_made_again() -> None:
    pending = PendingRequests()
    calls = [CallWorkers(call_id=1, method="ping"), GetMetrics(call_id=1), GetMetrics(call_id=2)]
    for call in calls:
        pending.sent(call)
    pending.received(MetricsReply(call_id=1, values={}))
    assert list(pending.commands()) == [calls[0], calls[2]]
    pending.received(CallWorkersReply(call_id=1))
    pending.received(CallWorkersReply(call_id=1))
    assert list(pending.commands()) == [calls[2]]


def test_many_tokens_are_cut_into_frames() -> None:
    pending = PendingRequests()
    pending.sent(AddRequests(requests=[make_request([1], ordinal=i) for i in range(3)]))
    for i in range(3):
        pending.received(delta(str(i), *range(FRAME_BYTES // 8)))
    assert [len(command.requests) for command in pending.commands() if isinstance(command, AddRequests)] == [2, 1]
