"""An engine beside `transformers`: how far each module's results are from the reference's, and where that jumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sempre.engine.frontend.prompts import PromptType
from sempre.engine.llm import LLM
from sempre.engine.proof.logprob_bits import float32_bits, ulps_between
from sempre.engine.sampling_params import SamplingParams

# float32 results of two correct implementations; bfloat16 has errors of 2**-8 of its own
FAR = 1e-4
FAR_BFLOAT16 = 0.05


@dataclass(frozen=True)
class ComparedOperation:
    """The element of one module's results that is furthest from the reference."""

    path: str
    operation: str
    row: int
    element: int
    value: float
    reference: float
    error: float
    """the difference, relative to the largest element of the reference's row"""

    @property
    def ulps(self) -> int:
        """How many float32 values apart the two are."""
        return ulps_between(self.value, self.reference)

    def sentence(self) -> str:
        """Return it in one sentence."""
        values = f"{self.value!r} (0x{float32_bits(self.value):08x}) against {self.reference!r}"
        return (
            f"{self.path} ({self.operation}), row {self.row}: element {self.element} is {values}, {self.ulps:,} ulp or"
            f" {self.error:.2g} of the row's largest apart"
        )


@dataclass(frozen=True)
class ReferenceComparison:
    """All modules, in the order of computing."""

    operations: tuple[ComparedOperation, ...]
    num_skipped: int
    """results that the reference does not compute as such"""
    far: float
    """an `error` beyond which two implementations do not compute the same"""

    @property
    def first_differing(self) -> ComparedOperation | None:
        """The first result of which an element has other bits."""
        return next((each for each in self.operations if each.ulps), None)

    @property
    def first_far(self) -> ComparedOperation | None:
        """The first result that is far from the reference."""
        return next((each for each in self.operations if not each.error <= self.far), None)

    @property
    def furthest(self) -> ComparedOperation:
        return max(self.operations, key=lambda each: each.error)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        first, far = self.first_differing, self.first_far
        return {
            "verdict": "close" if far is None else "different",
            "operations_compared": len(self.operations),
            "operations_skipped": self.num_skipped,
            "first_differing": None if first is None else first.sentence(),
            "first_far": None if far is None else far.sentence(),
            "furthest": self.furthest.sentence(),
            "operations": [{**asdict(each), "ulps": each.ulps} for each in self.operations],
        }


def compare_with_transformers(
    llm: LLM, folder: Path, prompt: PromptType, params: SamplingParams
) -> ReferenceComparison:
    """Generate, then compare what each module computes for prompt and output with `transformers` on this folder.

    Raises ConfigError without that library, ModelError for a checkpoint that it cannot load.
    """
    [output] = llm.generate(prompt, params, use_tqdm=False)
    sequence = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    [told, *_] = llm.collective_rpc("compare_with_transformers", args=[str(folder), sequence])
    assert isinstance(told, list)
    found = [_operation(entry) for entry in told if len(entry) > 3]
    far = FAR if llm.fingerprint_parts.get("dtype") == "float32" else FAR_BFLOAT16
    return ReferenceComparison(tuple(found), len(told) - len(found), far)


def _operation(told: Sequence[Any]) -> ComparedOperation:
    """Of what a worker tells of one result."""
    path, operation, _num_rows, row, element, value, reference, size = told
    return ComparedOperation(path, operation, row, element, value, reference, abs(value - reference) / size)
