"""Which status an exception of the engine is answered with."""

from __future__ import annotations

import pytest

from sempre.engine.server.errors import api_error
from sempre.ipc.errors import EngineDeadError, FrameLost, RequestError, WorkerDied


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "param"),
    [
        (RequestError("no", parameter="top_p"), 400, None, "top_p"),
        (EngineDeadError("the engine has died\nand why"), 503, "5", None),
        (WorkerDied("worker 0 died", rank=0, cause="killed"), 503, "5", None),
        (FrameLost("lost", expected=1, found=2), 500, None, None),
        (KeyError("a secret of ours"), 500, None, None),
    ],
)
def test_status(error: Exception, status: int, retry_after: str | None, param: str | None) -> None:
    answer = api_error(error)
    assert (answer.status, answer.headers.get("Retry-After"), answer.param) == (status, retry_after, param)
    assert "secret" not in str(answer)
    assert "and why" not in str(answer)
