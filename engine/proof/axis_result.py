"""The result of checking one axis of the guarantee, of this engine or of another server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sempre.engine.proof.differences import difference, num_logprobs_compared
from sempre.engine.proof.kept_output import KeptOutput

Verdict = Literal["equal", "different", "not checked"]


@dataclass(frozen=True)
class AxisResult:
    """One row of the table. A control is expected to differ."""

    verdict: Verdict
    axis: str = ""
    num_outputs: int = 0
    num_different: int = 0
    num_logprobs: int = 0
    """log-probabilities that were compared"""
    tokens_before: int | None = None
    """the fewest tokens before a difference"""
    detail: str | None = None
    """the first difference, or why it was not checked"""
    is_control: bool = False

    @property
    def is_as_expected(self) -> bool:
        """Whether an axis is equal, or a control different."""
        return self.verdict == ("different" if self.is_control else "equal")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "as_expected": self.is_as_expected}


def judged(expected: Sequence[KeptOutput], found: Sequence[KeptOutput], *, is_control: bool = False) -> AxisResult:
    """Compare the outputs of one way of running requests with those of the reference, in the same order."""
    different, before, detail, num_logprobs = 0, [], None, 0
    for one, other in zip(expected, found, strict=True):
        num_logprobs += num_logprobs_compared(one, other)
        first = difference(one, other)
        if first is not None:
            different += 1
            before += [] if first.position is None else [first.position]
            detail = detail or f"{one.name} {first.sentence()}"
    return AxisResult(
        "different" if different else "equal",
        num_outputs=len(expected),
        num_different=different,
        num_logprobs=num_logprobs,
        tokens_before=min(before, default=None),
        detail=detail,
        is_control=is_control,
    )


def not_checked(why: object, *, is_control: bool = False) -> AxisResult:
    """Return the row of an axis that this machine or model does not have."""
    return AxisResult("not checked", detail=str(why).splitlines()[0], is_control=is_control)
