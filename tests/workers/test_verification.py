"""Which of the tokens sampled after drafts are accepted, and that nothing is left of wrong drafts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sempre.ipc.messages import ErrorInfo, LogprobRows, NewRequest, SamplingSpec, ScheduledRequest
from sempre.workers.input_batch import InputBatch, StepPlan
from sempre.workers.sampling import GrammarCompiler, RowResult, SamplingState
from sempre.workers.verification import drafts_in_place, verified

VOCAB = 50
PARAMS = SamplingSpec(max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.4)
PROMPT, DRAFTS = [11, 12, 13], [5, 6, 5]


def sampled(token_id: int) -> RowResult:
    packed = token_id.to_bytes(4, "little")
    rows = LogprobRows(num_rows=1, width=1, token_ids=packed, logprobs=packed, ranks=packed, listed_ranks=packed)
    return RowResult(token_id, rows, None)


def failed(message: str) -> RowResult:
    return RowResult(None, None, ErrorInfo(type="ValueError", message=message))


@pytest.mark.parametrize(
    ("drafts", "tokens", "kept"),
    [
        ([], [3], [3]),
        ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]),
        ([5, 6, 7], [5, 6, 9, 8], [5, 6, 9]),
        ([5, 6, 7], [5, 9, 7, 8], [5, 9]),
        ([5, 6, 7], [9, 6, 7, 8], [9]),
        ([5, 5, 5], [9, 5, 5, 5], [9]),
    ],
)
def test_the_tokens_up_to_the_first_wrong_draft_are_accepted(
    drafts: list[int], tokens: list[int], kept: list[int]
) -> None:
    found = verified("a", drafts, [sampled(token) for token in tokens], rank=0)
    assert (found.request_id, found.token_ids, found.error) == ("a", kept, None)
    assert found.logprobs is not None
    assert (found.logprobs.num_rows, found.logprobs.width) == (len(kept), 1)
    for column in ("token_ids", "logprobs", "ranks", "listed_ranks"):
        assert np.frombuffer(getattr(found.logprobs, column), "<i4").tolist() == kept, column


def test_an_error_after_a_token_is_left_to_the_next_step() -> None:
    found = verified("a", [5, 6], [sampled(5), failed("later"), sampled(7)], rank=3)
    assert (found.token_ids, found.error) == ([5], None)
    found = verified("a", [5, 6], [failed("at once"), sampled(6), sampled(7)], rank=3)
    assert found.token_ids == []
    assert found.error is not None
    assert (found.error.message, found.error.rank) == ("at once", 3)


def drafted_step() -> StepPlan:
    batch = InputBatch(
        num_blocks=2, block_size=16, max_model_len=32, num_slots=1, grammars=GrammarCompiler(Path("none"), VOCAB)
    )
    batch.add(NewRequest(request_id="a", token_ids=[*PROMPT, 7], num_prompt_tokens=3, seed=1, params=PARAMS))
    item = ScheduledRequest(
        request_id="a", num_computed_tokens=3, num_tokens=4, block_table_start=0, block_ids=[1], draft_token_ids=DRAFTS
    )
    return batch.plan([item])


def processed(state: SamplingState, position: int) -> npt.NDArray[np.float32]:
    row = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    state.process(row, position)
    return row


def test_drafts_are_history_only_while_they_are_verified() -> None:
    plan = drafted_step()
    (request,) = plan.states
    with drafts_in_place(plan):
        assert request.token_ids == [*PROMPT, 7, *DRAFTS]
        for position in range(4, 8):
            fresh = SamplingState(PARAMS, 1, [*PROMPT, 7, *DRAFTS][:position], 3)
            assert np.array_equal(processed(request.sampling, position), processed(fresh, position))
    assert request.token_ids == [*PROMPT, 7]
    request.token_ids += [20, 21, 22]
    without = SamplingState(PARAMS, 1, [*PROMPT, 7, 20, 21, 22], 3)
    assert np.array_equal(processed(request.sampling, 7), processed(without, 7))


def test_drafts_are_taken_out_also_when_sampling_fails() -> None:
    plan = drafted_step()
    with pytest.raises(ArithmeticError), drafts_in_place(plan):
        raise ArithmeticError
    assert plan.states[0].token_ids == [*PROMPT, 7]
