"""The error of one row of a batch."""

from __future__ import annotations

from sempre.ipc.messages import NOT_READY, ErrorInfo


class RowError(Exception):
    """One row cannot be sampled; `operation` names the step. The other rows of the batch are not affected."""

    def __init__(self, operation: str, message: str) -> None:
        super().__init__(f"{operation}: {message}")
        self.operation = operation

    def info(self) -> ErrorInfo:
        facts: dict[str, str | int | None] = {"operation": self.operation, "parameter": self.operation}
        return ErrorInfo(type="RequestError", message=str(self), facts=facts)


class NotReady(RowError):
    """What the row needs is still being computed; a later step may request it again."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation, "the grammar is not ready yet")

    def info(self) -> ErrorInfo:
        return ErrorInfo(type=NOT_READY, message=str(self))


class NoDistribution(RowError):
    """A row of logits has no log-probabilities; `row` is its place in the call."""

    def __init__(self, row: int) -> None:
        super().__init__("prompt_logprobs", f"the logits of row {row} contain NaN or +inf, or nothing finite")
        self.row = row
