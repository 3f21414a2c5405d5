"""Where two engines first differ for one prompt: the token, then the layer and operation, with the bits of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sempre.engine.fingerprint import fingerprint_differences
from sempre.engine.frontend.prompts import PromptType
from sempre.engine.llm import LLM
from sempre.engine.proof.differences import Difference, difference
from sempre.engine.proof.kept_output import kept_completion
from sempre.engine.proof.traces import OperationDifference, Tracer, compare_operations
from sempre.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Bisection:
    """What two engines differ in."""

    token: Difference | None
    """the first difference of the outputs"""
    operation: OperationDifference | None
    num_operations: int
    """results that were compared, up to the first that differs"""
    changed_parts: tuple[str, ...]
    """of the fingerprint, in words"""

    @property
    def is_equal(self) -> bool:
        """Whether neither outputs nor results of modules differ."""
        return self.token is None and self.operation is None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        operation = None
        if self.operation is not None:
            operation = {**asdict(self.operation), "sentence": self.operation.sentence()}
        return {
            "verdict": "equal" if self.is_equal else "different",
            "token": None if self.token is None else self.token.to_dict(),
            "operation": operation,
            "operations_compared": self.num_operations,
            "fingerprint_changes": list(self.changed_parts),
        }


def bisect(a: LLM, b: LLM, prompt: PromptType, params: SamplingParams) -> Bisection:
    """Generate with both engines, then compare the results of every module for prompt and output of the first.

    Raises ConfigError if the models are not the same tree, RequestError for a refused prompt.
    """
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for llm in (a, b)]
    one, other = (kept_completion(output, output.outputs[0]) for output in outputs)
    token = difference(one, other, a.get_tokenizer().decode)
    # rows after the first difference belong to other tokens
    end = len(one.token_ids) if token is None or token.position is None else token.position
    sequence = [*outputs[0].prompt_token_ids, *one.token_ids[:end]]
    found = compare_operations(tracer(a), tracer(b), sequence)
    changed = tuple(fingerprint_differences(a.fingerprint_parts, b.fingerprint_parts))
    return Bisection(token, found.difference, found.num_operations, changed)


def tracer(llm: LLM) -> Tracer:
    """Return how an engine's workers are asked for their results."""
    parallel = llm.llm_engine.parallel_config
    return Tracer(
        lambda method, arguments: llm.collective_rpc(method, args=arguments),
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
    )
