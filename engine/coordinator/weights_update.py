"""New weights for all workers, or for none: each loads them beside the old ones, and once all have, each takes them.

    UpdateWeights → running requests end → stage on every rank
        → all have staged: commit on every rank → UpdateWeightsReply
        → one refuses: drop on every rank → UpdateWeightsReply with the error

Meanwhile no step is sent. A worker that dies before the commit ends the update; the successor of one that dies after
it loads the new weights from the start.
"""

from __future__ import annotations

from collections.abc import Iterable

from sempre.engine.coordinator.startup import StartUp
from sempre.engine.executor.base import Executor
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RanksDiffer, RequestError, SempreError, WorkerDied
from sempre.ipc.messages import CallMethod, CallMethodReply, UpdateWeights, UpdateWeightsReply

STAGE, COMMIT, DROP = "_stage_weights", "_commit_weights", "_drop_weights"

# far above the numbers of other calls
_FIRST_ID = 1 << 40


class WeightsUpdate:
    """At most one update at a time."""

    def __init__(self, executor: Executor, startup: StartUp) -> None:
        self._executor = executor
        self._startup = startup
        self._call_id = _FIRST_ID
        self._command: UpdateWeights | None = None
        self._has_begun = False
        self._commits = False
        self._lost: set[int] = set()
        self._replies: dict[int, CallMethodReply] = {}

    @property
    def is_pending(self) -> bool:
        """Whether requests that come now have to wait for new weights."""
        return self._command is not None

    @property
    def is_running(self) -> bool:
        """Whether workers are being given new weights."""
        return self._command is not None and self._has_begun

    @property
    def is_waiting(self) -> bool:
        """Whether an update is to start once nothing is unfinished."""
        return self._command is not None and not self._has_begun and not self._lost

    def accept(self, command: UpdateWeights, error: RequestError | None = None) -> UpdateWeightsReply | None:
        """Wait for the running requests; or say why not, which may be an `error` that is known before."""
        if self._command is not None:
            error = RequestError("update_weights: expected no other update of weights, found one that has not ended.")
        if error is not None:
            return UpdateWeightsReply(call_id=command.call_id, error=describe(error))
        self._command, self._has_begun, self._commits = command, False, False
        return None

    def start(self) -> None:
        """Nothing is unfinished: begin."""
        assert self._command is not None
        self._has_begun = True
        self._send(STAGE, [self._command.path])

    def take(self, rank: int, reply: CallMethodReply) -> UpdateWeightsReply | None:
        """The answer to the client, once the last worker has answered. Replies to former calls are ignored."""
        if self._command is None or reply.call_id != self._call_id:
            return None
        self._replies[rank] = reply
        return self._progress()

    def lose(self, ranks: Iterable[int], death: WorkerDied) -> UpdateWeightsReply | None:
        """Workers have died."""
        self._lost.update(ranks)
        if not self.is_running:
            return None
        if not self._commits:
            return self._fail(death)
        # a successor has nothing to commit
        self._replies |= {rank: CallMethodReply(rank=rank, call_id=self._call_id) for rank in self._lost}
        return self._progress()

    def resume(self, ranks: Iterable[int]) -> UpdateWeightsReply | None:
        """Their successors are ready, with the weights of the settings."""
        self._lost.difference_update(ranks)
        return self._progress() if self.is_running else None

    def _progress(self) -> UpdateWeightsReply | None:
        assert self._command is not None
        present = [rank for rank in range(self._executor.world_size) if rank not in self._lost]
        if any(rank not in self._replies for rank in present):
            return None
        if self._commits:
            return self._end() if not self._lost else None
        failed = next((reply.error for reply in self._replies.values() if reply.error is not None), None)
        if failed is not None:
            return self._drop(UpdateWeightsReply(call_id=self._command.call_id, error=failed))
        digests = [str(self._replies[rank].result) for rank in present]
        for rank, digest in zip(present, digests, strict=True):
            if digest != digests[0]:
                text = f"update_weights: rank {rank} read weights {digest}, rank 0 {digests[0]}"
                return self._fail(RanksDiffer(text, rank=rank, step_id=0, request_id=""))
        self._startup.change_weights(self._command.path, digests[0])
        self._commits = True
        self._send(COMMIT, [])
        return None

    def _end(self) -> UpdateWeightsReply:
        assert self._command is not None
        call_id, self._command = self._command.call_id, None
        return UpdateWeightsReply(call_id=call_id, fingerprint=self._startup.fingerprint)

    def _fail(self, error: SempreError) -> UpdateWeightsReply:
        assert self._command is not None
        return self._drop(UpdateWeightsReply(call_id=self._command.call_id, error=describe(error)))

    def _drop(self, reply: UpdateWeightsReply) -> UpdateWeightsReply:
        self._command = None
        self._send(DROP, [])
        return reply

    def _send(self, method: str, args: list[object]) -> None:
        self._call_id += 1
        self._replies.clear()
        for rank in range(self._executor.world_size):
            if rank not in self._lost:
                self._executor.send(rank, CallMethod(call_id=self._call_id, method=method, args=args))
