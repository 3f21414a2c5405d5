"""Whether all ranks of a replica computed the same in a step.

The ranks of a stage share its layers, and those of the last stage each sample by themselves. The others know the tokens
that they were told, and each stage the hidden states that it took over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from sempre.ipc.errors import RanksDiffer
from sempre.ipc.messages import SampledTokens, StepResult

_Difference = tuple[str, object, object]
_Differences = Callable[[SampledTokens, SampledTokens], Iterator[_Difference]]


def compare_ranks(results: Mapping[int, StepResult], ranks_per_stage: int) -> StepResult:
    """Return the result of the last stage. Raise RanksDiffer for the first rank whose result does not fit the others'.

    Each rank is compared with the first one of its stage, and that one with the first one of the stage before.
    """
    ranks = sorted(results)
    for place, rank in enumerate(ranks):
        number = place % ranks_per_stage
        if number:
            _compare(results[ranks[place - number]], results[rank], _differences)
        elif place:
            _compare(results[ranks[place - ranks_per_stage]], results[rank], _differences_of_stages)
    return results[ranks[-ranks_per_stage]]


def _compare(expected: StepResult, found: StepResult, differences: _Differences) -> None:
    for one, other in zip(expected.sampled, found.sampled, strict=False):
        for what, wanted, got in differences(one, other):
            raise _differ(found, expected, one.request_id, f"{what}: expected {wanted}, found {got}")
    if len(expected.sampled) != len(found.sampled):
        counts = f"expected {len(expected.sampled)} results, found {len(found.sampled)}"
        raise _differ(found, expected, "", counts)


def _differences(one: SampledTokens, other: SampledTokens) -> Iterator[_Difference]:
    """What differs within a stage, with both values, the most telling first."""
    pairs = [
        ("request", one.request_id, other.request_id),
        ("hidden state from the stage before", one.received_digest.hex(), other.received_digest.hex()),
        ("hidden state", one.hidden_digest.hex(), other.hidden_digest.hex()),
        *_results(one, other),
        ("log-probabilities", one.logprobs, other.logprobs),
        ("log-probabilities of the prompt", one.prompt_logprobs, other.prompt_logprobs),
        ("pooled", one.pooled and one.pooled.hex(), other.pooled and other.pooled.hex()),
    ]
    return ((what, wanted, got) for what, wanted, got in pairs if wanted != got)


def _differences_of_stages(one: SampledTokens, other: SampledTokens) -> Iterator[_Difference]:
    """What differs between a stage and the next one."""
    pairs = [
        ("request", one.request_id, other.request_id),
        ("hidden state from the stage before", one.hidden_digest.hex(), other.received_digest.hex()),
        *_results(one, other),
    ]
    return ((what, wanted, got) for what, wanted, got in pairs if wanted != got)


def _results(one: SampledTokens, other: SampledTokens) -> list[_Difference]:
    return [
        ("tokens", one.token_ids, other.token_ids),
        ("error", one.error and one.error.type, other.error and other.error.type),
    ]


def _differ(found: StepResult, expected: StepResult, request_id: str, difference: str) -> RanksDiffer:
    where = f"request {request_id!r}, " if request_id else ""
    return RanksDiffer(
        f"rank {found.rank} differs from rank {expected.rank} in step {found.step_id}, {where}{difference}",
        rank=found.rank,
        step_id=found.step_id,
        request_id=request_id,
    )
