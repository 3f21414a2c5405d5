"""The error of one row of a batch."""

from __future__ import annotations

from sempre.ipc.messages import ErrorInfo


class RowError(Exception):
    """One row cannot be sampled; `operation` names the step. The other rows of the batch are not affected."""

    def __init__(self, operation: str, message: str) -> None:
        super().__init__(f"{operation}: {message}")
        self.operation = operation

    def info(self) -> ErrorInfo:
        facts: dict[str, str | int | None] = {"operation": self.operation, "parameter": self.operation}
        return ErrorInfo(type="RequestError", message=str(self), facts=facts)
