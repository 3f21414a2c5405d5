"""Whether all ranks of a replica computed the same in a step: they share the model, and each samples by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sempre.ipc.errors import RanksDiffer
from sempre.ipc.messages import SampledTokens, StepResult


def compare_ranks(results: Mapping[int, StepResult]) -> None:
    """Raise RanksDiffer for the first rank whose result of a step is not that of the first one."""
    first, *others = sorted(results)
    expected = results[first]
    for rank in others:
        found = results[rank]
        for one, other in zip(expected.sampled, found.sampled, strict=False):
            for what, wanted, got in _differences(one, other):
                raise _differ(rank, first, found.step_id, one.request_id, f"{what}: expected {wanted}, found {got}")
        if len(expected.sampled) != len(found.sampled):
            counts = f"expected {len(expected.sampled)} results, found {len(found.sampled)}"
            raise _differ(rank, first, found.step_id, "", counts)


def _differences(one: SampledTokens, other: SampledTokens) -> Iterator[tuple[str, object, object]]:
    """What differs, with both values, the most telling first."""
    pairs = [
        ("request", one.request_id, other.request_id),
        ("hidden state", one.hidden_digest.hex(), other.hidden_digest.hex()),
        ("tokens", one.token_ids, other.token_ids),
        ("error", one.error and one.error.type, other.error and other.error.type),
        ("log-probabilities", one.logprobs, other.logprobs),
        ("log-probabilities of the prompt", one.prompt_logprobs, other.prompt_logprobs),
        ("pooled", one.pooled and one.pooled.hex(), other.pooled and other.pooled.hex()),
    ]
    return ((what, wanted, got) for what, wanted, got in pairs if wanted != got)


def _differ(rank: int, first: int, step_id: int, request_id: str, difference: str) -> RanksDiffer:
    where = f"request {request_id!r}, " if request_id else ""
    return RanksDiffer(
        f"rank {rank} differs from rank {first} in step {step_id}, {where}{difference}",
        rank=rank,
        step_id=step_id,
        request_id=request_id,
    )
