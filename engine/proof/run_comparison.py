"""Two runs compared output by output: saved outputs or receipts, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sempre.engine.fingerprint import fingerprint_bits, fingerprint_differences
from sempre.engine.proof.differences import Difference, difference, num_logprobs_compared
from sempre.engine.proof.json_lines import read_json_lines
from sempre.engine.proof.kept_output import KeptOutput, kept_completions, kept_receipt
from sempre.engine.proof.receipt_log import is_receipt, read_receipts, receipt_files
from sempre.engine.proof.saved_outputs import read_outputs
from sempre.ipc.errors import RecordError


@dataclass
class Run:
    """What one side holds."""

    name: str
    outputs: list[KeptOutput] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """lines that could not be read"""
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    """of receipts, by the name of the output"""
    bits: list[dict[str, str]] = field(default_factory=list)
    """the fingerprints' parts that receipts name, each once"""

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the outputs, each once, in order."""
        return list(dict.fromkeys(output.fingerprint for output in self.outputs))


@dataclass(frozen=True)
class Pair:
    """An output of either run that the same request made, and where they first differ."""

    a: KeptOutput
    b: KeptOutput
    difference: Difference | None
    changed_params: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunComparison:
    """What two runs have in common, and where they differ."""

    a: Run
    b: Run
    pairs: list[Pair]
    only_a: list[KeptOutput]
    only_b: list[KeptOutput]
    num_logprobs: int
    """log-probabilities that were compared"""

    @property
    def different(self) -> list[Pair]:
        """The pairs that differ."""
        return [pair for pair in self.pairs if pair.difference is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first run that have a partner."""
        return sum(len(pair.a.token_ids) for pair in self.pairs)

    @property
    def is_equal(self) -> bool:
        """Whether all outputs have a partner and none differs."""
        return bool(self.pairs) and not (self.different or self.only_a or self.only_b)

    @property
    def problems(self) -> list[str]:
        """Lines of either run that could not be read."""
        return [*self.a.problems, *self.b.problems]

    def changed_parts(self) -> list[str]:
        """Return the parts of the fingerprint that differ, in words; the digests, where the parts are not known."""
        if self.a.bits and self.b.bits:
            return fingerprint_differences(self.a.bits[0], self.b.bits[0])
        one, other = self.a.fingerprints, self.b.fingerprints
        return [] if one == other else [f"fingerprint {', '.join(one)} against {', '.join(other)}"]

    def kinds(self) -> dict[str, int]:
        """Return how many pairs differ in which way first."""
        return dict(Counter(pair.difference.kind for pair in self.pairs if pair.difference is not None))

    def positions(self) -> list[int]:
        """Return the positions of the first differences, in ascending order."""
        found = (pair.difference.position for pair in self.pairs if pair.difference is not None)
        return sorted(position for position in found if position is not None)

    def verdict(self) -> str:
        """Return the result in one sentence."""
        count = len(self.pairs)
        values = f", {self.num_logprobs:,} log-probabilities" if self.num_logprobs else ""
        what = f"{count:,} output{'s' * (count != 1)}, {self.num_tokens:,} tokens{values}"
        if self.is_equal:
            return f"{what}: equal, bit for bit"
        parts = [f"{len(self.different):,} different"] if self.different else []
        for run, alone in ((self.a, self.only_a), (self.b, self.only_b)):
            if alone:
                parts.append(f"{len(alone):,} more in {run.name} alone")
        return f"{what}: {', '.join(parts) or 'nothing to compare'}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything that a program may want to know."""
        positions = self.positions()
        return {
            "verdict": "equal" if self.is_equal else "different",
            "sentence": self.verdict(),
            "a": self.a.name,
            "b": self.b.name,
            "outputs": len(self.pairs),
            "tokens": self.num_tokens,
            "logprobs": self.num_logprobs,
            "only_a": [output.name for output in self.only_a],
            "only_b": [output.name for output in self.only_b],
            "kinds": self.kinds(),
            "tokens_until_first_difference": {
                "least": positions[0] if positions else None,
                "median": median(positions) if positions else None,
                "most": positions[-1] if positions else None,
            },
            "fingerprint_changes": self.changed_parts(),
            "problems": self.problems,
            "different": [
                {"a": pair.a.name, "b": pair.b.name, "parameters": list(pair.changed_params), **_told(pair)}
                for pair in self.different
            ],
        }


def _told(pair: Pair) -> dict[str, Any]:
    assert pair.difference is not None
    found = pair.difference.to_dict()
    return {"first": found.pop("a"), "second": found.pop("b"), **found}


def load_run(path: Path) -> Run:
    """Return the outputs of a file that `save_outputs` wrote, or of a file or folder of receipts.

    Raises RecordError for a file of another kind, and one that cannot be read.
    """
    run = Run(str(path))
    for file in receipt_files(path):
        first = next(read_json_lines(file), None)
        if first is not None and first.error is None and is_receipt(first.value):
            _add_receipts(run, file)
        else:
            _add_outputs(run, file)
    return run


def compare_runs(a: Run, b: Run) -> RunComparison:
    """Compare each output with that of the same prompt and seed in the other run; equal requests go by their order."""
    waiting: dict[object, list[KeptOutput]] = {}
    for output in b.outputs:
        waiting.setdefault(_key(output), []).append(output)
    pairs, only_a, num_logprobs = [], [], 0
    for output in a.outputs:
        partners = waiting.get(_key(output))
        if not partners:
            only_a.append(output)
            continue
        partner = partners.pop(0)
        changed = _changed_params(a.params.get(output.name), b.params.get(partner.name))
        pairs.append(Pair(output, partner, difference(output, partner), changed))
        num_logprobs += num_logprobs_compared(output, partner)
    only_b = [output for partners in waiting.values() for output in partners]
    return RunComparison(a, b, pairs, only_a, only_b, num_logprobs)


def _key(output: KeptOutput) -> object:
    # -2 and 2**64 - 2 are one seed
    return output.prompt_digest, output.seed % 2**64


def _changed_params(a: dict[str, Any] | None, b: dict[str, Any] | None) -> tuple[str, ...]:
    if a is None or b is None:
        return ()
    names = sorted({*a, *b})
    return tuple(
        f"{name}: {a.get(name, 'default')} against {b.get(name, 'default')}"
        for name in names
        if a.get(name) != b.get(name)
    )


def _add_outputs(run: Run, file: Path) -> None:
    for found in read_outputs(file):
        if isinstance(found, RecordError):
            run.problems.append(str(found))
        else:
            run.outputs += kept_completions(found)


def _add_receipts(run: Run, file: Path) -> None:
    for found in read_receipts(file):
        if isinstance(found, RecordError):
            run.problems.append(str(found))
            continue
        output = kept_receipt(found)
        definition = found.statement.predicate.build_definition
        asked = definition.external_parameters
        run.outputs.append(output)
        run.params[output.name] = {**asked.sampling_params, **(asked.pooling or {}), **(asked.beam_search or {})}
        bits = fingerprint_bits(definition.internal_parameters.bits_by_name)
        if bits not in run.bits:
            run.bits.append(bits)


def num_by_position(positions: Sequence[int], num_bins: int = 12) -> list[tuple[int, int, int]]:
    """Return a histogram of positions: (first, last, count) of each bin, whose widths are equal."""
    if not positions:
        return []
    width = max(1, -(-(positions[-1] + 1) // num_bins))
    counts = Counter(position // width for position in positions)
    return [(i * width, (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]


def shortened(outputs: Iterable[KeptOutput], most: int) -> str:
    """Return the names of the first outputs, for a message."""
    names = [output.name for output in outputs]
    return "; ".join(names[:most]) + (f"; and {len(names) - most:,} more" if len(names) > most else "")
