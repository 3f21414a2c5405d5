"""The first difference of two outputs, in words and with all bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sempre.engine.proof.kept_output import KeptOutput, marks_of_rows
from sempre.engine.proof.logprob_bits import float32_bits, from_bits, shown_logprob, ulps_between
from sempre.engine.proof.output_chain import OutputChain, first_difference, recorded_bits

Kind = Literal["token", "logprob", "distribution", "pooled", "length", "end", "error"]
# as far as a log-probability that only a mark was kept of is searched around the other one
_REACH_ULPS = 1 << 15
_CONTEXT_TOKENS = 8

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two outputs at the first difference."""

    token_id: int | None
    text: str | None
    """of the token"""
    logprob: float | None
    """or the element of what is pooled"""
    end: str

    @property
    def bits(self) -> str | None:
        """The float32 bits of the log-probability."""
        return None if self.logprob is None else f"0x{float32_bits(self.logprob):08x}"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two outputs first differ. `position` counts output tokens, or elements of what is pooled, from 0; None if
    they differ as a whole."""

    kind: Kind
    position: int | None
    a: Side
    b: Side
    context: str | None = None
    """the text before the position, shortened"""

    def sentence(self) -> str:
        """Return the difference in one sentence."""
        where = "" if self.position is None else f"at output token {self.position}"
        after = "" if self.context is None else f", after {self.context!r}"
        match self.kind:
            case "token":
                return f"{where}{after}: token {_token(self.a)} against {_token(self.b)}"
            case "logprob":
                if self.a.logprob is None and self.b.logprob is None:
                    return f"{where}{after}: other log-probabilities of token {_token(self.a)}, kept as marks"
                return f"{where}{after}: log-probability of token {_token(self.a, alone=True)}: {self._values()}"
            case "pooled":
                return f"at element {self.position} of what is pooled: {self._values()}"
            case "distribution":
                return f"{where}{after}: the same token and log-probability, but other log-probabilities beside it"
            case "length" | "end" | "error":
                return f"{self.a.end} against {self.b.end}"

    def _values(self) -> str:
        apart = ""
        if self.a.logprob is not None and self.b.logprob is not None and _are_finite(self.a, self.b):
            apart = f", {ulps_between(self.a.logprob, self.b.logprob)} ulp apart"
        return f"{_logprob(self.a)} against {_logprob(self.b)}{apart}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with the bits."""
        found = asdict(self)
        for name, side in (("a", self.a), ("b", self.b)):
            found[name]["bits"] = side.bits
        return {**found, "sentence": self.sentence()}


def difference(a: KeptOutput, b: KeptOutput, decode: Decode | None = None) -> Difference | None:
    """Return the first difference of two outputs of the same request; None if all that both kept is equal.

    Compares tokens, log-probabilities (or marks, where one has only those), all other reported ones if both were kept,
    and how the outputs ended. `decode` makes text of tokens, for the context.
    """
    if a.error is not None or b.error is not None:
        return None if a.error == b.error else Difference("error", None, _end(a), _end(b))
    if a.pooled is not None or b.pooled is not None:
        return _pooled_difference(a, b)
    common = min(len(a.token_ids), len(b.token_ids))
    token = next((i for i in range(common) if a.token_ids[i] != b.token_ids[i]), None)
    logprob = _first_logprob(a, b)
    rows = _first_row(a, b)
    places: list[tuple[int, int, Kind]] = []
    if token is not None:
        places.append((token, 0, "token"))
    if logprob is not None:
        places.append((logprob, 1, "logprob"))
    if rows is not None:
        places.append((rows, 2, "distribution"))
    if places:
        position, _, kind = min(places)
        return _at(kind, position, a, b, decode)
    if len(a.token_ids) != len(b.token_ids):
        return Difference("length", common, _end(a), _end(b), _context(a, common, decode))
    if (a.finish_reason, a.stop_reason) != (b.finish_reason, b.stop_reason):
        return Difference("end", None, _end(a), _end(b))
    return None


def _pooled_difference(a: KeptOutput, b: KeptOutput) -> Difference | None:
    """Return the first element of what was pooled that differs."""
    one, other = (memoryview(kept.pooled or b"").cast("I") for kept in (a, b))
    for position, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1]:
            first, second = (Side(None, None, from_bits(bits), "") for bits in pair)
            return Difference("pooled", position, first, second)
    return None if len(one) == len(other) else Difference("length", None, _end(a), _end(b))


def num_logprobs_compared(a: KeptOutput, b: KeptOutput) -> int:
    """Return how many log-probabilities of two outputs `difference` compares."""
    if a.chain_marks() is None or b.chain_marks() is None:
        return 0
    count = min(len(a.token_ids), len(b.token_ids))
    if a.rows is not None and b.rows is not None:
        return sum(len(row) for row in a.rows[:count])
    return count


def _first_logprob(a: KeptOutput, b: KeptOutput) -> int | None:
    if a.logprobs is not None and b.logprobs is not None:
        pairs = enumerate(zip(a.logprobs, b.logprobs, strict=False))
        return next((i for i, (one, other) in pairs if float32_bits(one) != float32_bits(other)), None)
    one, other = a.chain_marks(), b.chain_marks()
    return None if one is None or other is None else first_difference(one, other)


def _first_row(a: KeptOutput, b: KeptOutput) -> int | None:
    """Return the first position where other reported log-probabilities differ."""
    if a.rows is not None and b.rows is not None:
        pairs = enumerate(zip(a.rows, b.rows, strict=False))
        return next((i for i, (one, other) in pairs if _bits(one) != _bits(other)), None)
    one, other = (
        kept.distribution_marks or (None if kept.rows is None else marks_of_rows(kept.rows)) for kept in (a, b)
    )
    if one is None or other is None or (a.distribution_marks is None and b.distribution_marks is None):
        return None
    return first_difference(one, other)


def _bits(row: Any) -> list[tuple[int, int, int | None]]:
    return [(token_id, float32_bits(entry.logprob), entry.rank) for token_id, entry in row.items()]


def _at(kind: Kind, position: int, a: KeptOutput, b: KeptOutput, decode: Decode | None) -> Difference:
    one, other = _side(a, position, b, decode), _side(b, position, a, decode)
    return Difference(kind, position, one, other, _context(a, position, decode))


def _side(kept: KeptOutput, position: int, other: KeptOutput, decode: Decode | None) -> Side:
    token_id = kept.token_ids[position]
    text = kept.token_text(position)
    if text is None and decode is not None:
        text = decode([token_id])
    return Side(token_id, text, _logprob_at(kept, position, other), _end(kept).end)


def _logprob_at(kept: KeptOutput, position: int, other: KeptOutput) -> float | None:
    """Return a log-probability; of a mark alone, by search around that of the other output, which begins alike."""
    if kept.logprobs is not None:
        return kept.logprobs[position]
    if kept.marks is None or other.logprobs is None or kept.token_ids[position] != other.token_ids[position]:
        return None
    chain = OutputChain()
    for token_id, value in zip(other.token_ids[:position], other.logprobs, strict=False):
        chain.add_tokens([token_id], float32_bits(value).to_bytes(4, "little"), 4)
    mark = kept.marks[4 * position : 4 * position + 4]
    near = float32_bits(other.logprobs[position])
    bits = recorded_bits(chain.state, kept.token_ids[position], near, mark, _REACH_ULPS)
    return None if bits is None else from_bits(bits)


def _context(kept: KeptOutput, position: int, decode: Decode | None) -> str | None:
    before = kept.token_ids[max(0, position - _CONTEXT_TOKENS) : position]
    if not before:
        return None
    texts = [kept.token_text(i) for i in range(position - len(before), position)]
    if decode is not None:
        return decode(before)
    return None if None in texts else "".join(text for text in texts if text is not None)


def _end(kept: KeptOutput) -> Side:
    stop = "" if kept.stop_reason is None else f" by {kept.stop_reason!r}"
    if kept.pooled is not None:
        return Side(None, None, None, f"{len(kept.pooled) // 4} pooled elements")
    text = f"{len(kept.token_ids)} tokens, ended: {kept.finish_reason}{stop}" if kept.error is None else kept.error
    return Side(None, None, None, text)


def _token(side: Side, *, alone: bool = False) -> str:
    text = "" if side.text is None else f" {side.text!r}"
    value = "" if alone or side.logprob is None else f" (logprob {shown_logprob(side.logprob)})"
    return f"{side.token_id}{text}{value}"


def _logprob(side: Side) -> str:
    return "one that was not kept" if side.logprob is None else shown_logprob(side.logprob)


def _are_finite(a: Side, b: Side) -> bool:
    return all(
        side.logprob is not None and abs(side.logprob) != float("inf") and side.logprob == side.logprob
        for side in (a, b)
    )
