"""What a draft model is asked for, and how far its keys and values are valid, with a runner that records it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import DraftRequest, ErrorInfo, ExecuteStep, NewRequest, SampledTokens, SamplingSpec
from sempre.workers.drafters.base import DraftTask
from sempre.workers.drafters.model import ModelDrafter
from sempre.workers.step_validation import StepLimits

BLOCK = 16
PROMPT = list(range(100, 140))


@dataclass
class Scribe:
    """Drafts 7, 8, …"""

    num_blocks: int
    max_model_len: int = 200
    max_num_batched_tokens: int = 64
    admitted: list[NewRequest] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    asked: list[DraftTask] = field(default_factory=list)

    @property
    def limits(self) -> StepLimits:
        return StepLimits(self.max_model_len, 8, self.max_num_batched_tokens, 320)

    @property
    def cache(self) -> Any:
        return SimpleNamespace(num_blocks=self.num_blocks, block_size=BLOCK)

    def admit(self, new: NewRequest) -> bool:
        self.admitted.append(new)
        return True

    def release(self, request_id: str) -> None:
        self.released.append(request_id)

    def draft(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        self.asked += [
            replace(item, token_ids=item.token_ids.copy(), block_ids=item.block_ids.copy()) for item in tasks
        ]
        return [list(range(7, 7 + item.count)) for item in tasks]

    def prepare(self) -> None:
        return


def new(request_id: str, **params: Any) -> NewRequest:
    spec = SamplingSpec(**{"max_tokens": 50, **params})
    return NewRequest(
        request_id=request_id, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), seed=2**40 + 5, params=spec
    )


def ask(drafter: ModelDrafter, name: str, count: int, token_ids: Sequence[int] = ()) -> list[list[int]]:
    """Drafts for one request, which has gained these tokens."""
    return drafter.propose([DraftRequest(request_id=name, token_ids=[*token_ids], num_drafts=count)])


def test_the_drafter_samples_by_the_request_s_own_seed_and_parameters() -> None:
    scribe = Scribe(num_blocks=8)
    drafter = ModelDrafter(scribe, max_num_seqs=2)
    request = new("a", temperature=0.7, top_p=0.9, logprobs=3, prompt_logprobs=2)
    drafter.add(request)
    assert ask(drafter, "a", 3) == [[7, 8, 9]]
    (admitted,) = scribe.admitted
    assert (admitted.seed, admitted.token_ids, admitted.num_prompt_tokens) == (request.seed, PROMPT, len(PROMPT))
    assert admitted.params == new("a", temperature=0.7, top_p=0.9).params


@pytest.mark.parametrize(
    ("tokens", "num_right"), [([1], 40), ([1, 2], 40), ([7, 1], 41), ([7, 8, 1], 42), ([7, 8, 9, 1], 43)]
)
def test_keys_and_values_hold_as_far_as_the_drafts_were_right(tokens: list[int], num_right: int) -> None:
    scribe = Scribe(num_blocks=8)
    drafter = ModelDrafter(scribe, max_num_seqs=2)
    drafter.add(new("a"))
    ask(drafter, "a", 3)
    ask(drafter, "a", 2, tokens)
    first, second = scribe.asked
    assert (first.num_unchanged, first.num_computed, first.token_ids) == (40, 0, PROMPT)
    assert (second.num_unchanged, second.token_ids) == (num_right, [*PROMPT, *tokens])
    # nothing was computed for the last draft
    assert second.num_computed == min(num_right, 42)
    assert second.block_ids == first.block_ids


def test_a_sequence_whose_blocks_were_taken_is_computed_from_its_first_token() -> None:
    scribe = Scribe(num_blocks=4)
    drafter = ModelDrafter(scribe, max_num_seqs=2)
    for name in ("a", "b"):
        drafter.add(new(name))
        ask(drafter, name, 3)
    ask(drafter, "a", 3, [7, 8, 1])
    a, b, again = scribe.asked
    assert set(a.block_ids) & set(b.block_ids), "there is room for one of them only"
    assert (again.num_computed, len(again.block_ids)) == (0, 3)


def test_drafts_are_bounded_by_what_the_request_and_the_model_may_have() -> None:
    scribe = Scribe(num_blocks=8, max_model_len=42)
    drafter = ModelDrafter(scribe, max_num_seqs=2)
    for name, max_tokens in (("ends", 2), ("last", 1), ("long", 50)):
        drafter.add(new(name, max_tokens=max_tokens))
    assert [*ask(drafter, "ends", 5), *ask(drafter, "last", 5)] == [[7], []]
    assert ask(drafter, "long", 5) == [[7, 8]]


def test_nothing_is_drafted_after_a_step_that_has_failed() -> None:
    scribe = Scribe(num_blocks=8)
    drafter = ModelDrafter(scribe, max_num_seqs=2)
    failed = SampledTokens(request_id="a", error=ErrorInfo(type="ValueError", message="scripted"))
    drafter.observe(ExecuteStep(step_id=0, new_requests=[new("a"), new("b")]), [failed])
    assert [*ask(drafter, "a", 2), *ask(drafter, "b", 2)] == [[], [7, 8]]


def test_a_draft_for_a_request_that_nobody_knows_is_refused() -> None:
    drafter = ModelDrafter(Scribe(num_blocks=8), max_num_seqs=2)
    drafter.observe(ExecuteStep(step_id=0, new_requests=[new("a")]))
    drafter.observe(ExecuteStep(step_id=1, finished_request_ids=["a", "never known"]))
    with pytest.raises(MessageMalformed, match=r"drafts\.request_id: expected a known request, found 'a'"):
        ask(drafter, "a", 2)
