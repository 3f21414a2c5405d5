"""A request that fails, fails alone; a step that is wrong is refused with the field's name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import MessageMalformed, ProtocolError
from sempre.ipc.messages import (
    CallMethod,
    DraftRequest,
    ExecuteStep,
    NewRequest,
    PromptCandidates,
    SamplingSpec,
    ScheduledRequest,
)
from sempre.workers.worker import Worker

GREEDY = SamplingSpec(max_tokens=4, temperature=0.0, logprobs=2)
POISON = 13


@pytest.fixture
def poisoned(checkpoints: Any, tmp_path: Path) -> Path:
    """A checkpoint whose embedding of one token is NaN: a request with that token gets NaN logits."""
    source = checkpoints("llama").folder
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return tmp_path


def test_nan_logits_fail_one_request_only(poisoned: Path, serve: Any, prompt: Any) -> None:
    serving = serve(poisoned)
    good = [prompt("a", [5, 6, 7, 8], GREEDY), prompt("b", [9, 10, 11], GREEDY)]
    alone = serving.run(*good)
    beside = serving.run(good[0], prompt("bad", [5, POISON, 6], GREEDY), good[1])
    assert beside["bad"].token_ids == []
    assert "logits" in beside["bad"].errors[0]
    assert {name: beside[name] for name in ("a", "b")} == alone


def test_nan_in_prompt_logprobs_fails_one_request_only(poisoned: Path, serve: Any, prompt: Any) -> None:
    scoring = SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    good = prompt("good", [5, 6, 7, 8], GREEDY)
    done = serve(poisoned).run(good, prompt("bad", [5, POISON, 6, 7, 8], scoring, chunks=(4, 1)))
    assert "prompt_logprobs" in done["bad"].errors[0]
    assert len(done["good"].token_ids) == 4


def test_a_failed_request_fails_again_and_harms_nobody(poisoned: Path, serve: Any, prompt: Any) -> None:
    """A step for it may already be queued when its error arrives."""
    serving = serve(poisoned)
    new = [serving.new_request(prompt("bad", [POISON], GREEDY)), serving.new_request(prompt("good", [5], GREEDY))]
    [bad, good] = serving.step([scheduled("bad", 0, 1, [0]), scheduled("good", 0, 1, [1])], new)
    assert bad.error is not None
    assert good.error is None
    [bad, good] = serving.step([scheduled("bad", 1, 1, []), scheduled("good", 1, 1, [])])
    assert bad.error is not None
    assert len(good.token_ids) == 1


def test_no_allowed_token_fails_one_request_only(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("llama").folder)
    impossible = SamplingSpec(max_tokens=4, min_tokens=2, allowed_token_ids=[2], eos_token_ids=[2])
    done = serving.run(prompt("impossible", [5, 6], impossible), prompt("good", [5, 6], GREEDY))
    assert "no token is allowed" in done["impossible"].errors[0]
    assert len(done["good"].token_ids) == 4


def test_token_outside_the_vocabulary_fails_one_request_only(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("llama").folder)
    done = serving.run(prompt("bad", [5, 320], GREEDY), prompt("good", [5, 6], GREEDY))
    assert done["bad"].errors == ["token_ids: expected ids less than vocab_size=320, found 320."]
    assert len(done["good"].token_ids) == 4


@pytest.mark.parametrize(
    ("token_ids", "text"),
    [
        ([7], "expected 2 rows of 1 ids, 8 bytes, found 4 bytes."),
        ([7, 320], "expected ids less than vocab_size=320, or -1, found 320."),
        ([-2, 7], "expected ids less than vocab_size=320, or -1, found -2."),
    ],
)
def test_unfit_candidates_fail_one_request_only(
    token_ids: list[int], text: str, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    serving = serve(checkpoints("llama").folder)
    given = PromptCandidates(start=1, width=1, token_ids=struct.pack(f"<{len(token_ids)}i", *token_ids))
    unfit = SamplingSpec(max_tokens=1, prompt_candidates=given)
    done = serving.run(prompt("bad", [5, 6, 7, 8], unfit), prompt("good", [5, 6], GREEDY))
    assert done["bad"].errors == [f"prompt_candidates: {text}"]
    assert len(done["good"].token_ids) == 4


def test_sequence_longer_than_the_limit_fails_one_request_only(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("llama").folder, max_model_len=32)
    done = serving.run(prompt("bad", [5] * 33, GREEDY), prompt("good", [5, 6], GREEDY))
    assert done["bad"].errors == ["token_ids: expected 33 to 32 tokens, found 33."]
    assert len(done["good"].token_ids) == 4


def scheduled(request_id: str, computed: int, amount: int, block_ids: list[int], start: int = 0) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id,
        num_computed_tokens=computed,
        num_tokens=amount,
        block_table_start=start,
        block_ids=block_ids,
    )


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([scheduled("unknown", 0, 1, [0])], "scheduled.request_id"),
        ([scheduled("known", 0, 1, [0]), scheduled("known", 0, 1, [0])], "scheduled.request_id"),
        ([scheduled("known", 0, 4, [0])], "scheduled.num_tokens"),
        ([scheduled("known", 0, 3, [])], "scheduled.block_ids"),
        ([scheduled("known", 0, 3, [9999])], "scheduled.block_ids"),
        ([scheduled("known", 0, 3, [0], start=1)], "scheduled.block_table_start"),
        ([scheduled("known", 0, 65, [0])], "scheduled.num_tokens"),
    ],
)
def test_wrong_step_is_refused(items: list[ScheduledRequest], field: str, checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder, max_num_batched_tokens=64)
    new = NewRequest(request_id="known", token_ids=[5, 6, 7], num_prompt_tokens=3, seed=0, params=GREEDY)
    with pytest.raises(MessageMalformed, match=field.rsplit(".", maxsplit=1)[-1]) as caught:
        serving.step(items, [new])
    assert caught.value.field == field


DRAFT_MODEL = SpeculativeConfig(method="draft_model", model="itself")
DRAFTS = [DraftRequest(request_id="known", num_drafts=2)]


@pytest.mark.parametrize(
    ("settings", "changes", "field"),
    [
        ({}, {"drafts": DRAFTS}, "drafts"),
        ({"role": "draft"}, {}, "scheduled"),
        ({"role": "draft"}, {"scheduled": [], "new_requests": [], "drafts": DRAFTS}, "drafts.request_id"),
        ({"speculative_config": DRAFT_MODEL}, {"scheduled": [], "drafts": DRAFTS}, "drafts"),
        ({"speculative_config": DRAFT_MODEL}, {"drafts": [replace(DRAFTS[0], token_ids=[5])]}, "drafts"),
    ],
)
def test_a_step_that_is_not_for_this_role_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], field: str, checkpoints: Any, serve: Any
) -> None:
    folder = checkpoints("llama").folder
    if "speculative_config" in settings:
        settings = {"speculative_config": replace(DRAFT_MODEL, model_path=str(folder))}
    new = NewRequest(request_id="known", token_ids=[5, 6, 7], num_prompt_tokens=3, seed=0, params=GREEDY)
    step = ExecuteStep(step_id=0, new_requests=[new], scheduled=[scheduled("known", 0, 3, [0])])
    worker = serve(folder, **settings).worker

    def execute(step: ExecuteStep) -> None:
        worker.submit(step)
        worker.collect()

    with pytest.raises(MessageMalformed) as caught:
        execute(replace(step, **changes))
    assert caught.value.field == field


def test_request_sent_twice_is_refused(checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder)
    new = NewRequest(request_id="known", token_ids=[5], num_prompt_tokens=1, seed=0, params=GREEDY)
    serving.step([], [new])
    with pytest.raises(MessageMalformed, match="known"):
        serving.step([], [new])


def test_commands_out_of_order_are_refused() -> None:
    with pytest.raises(ProtocolError, match="StartServing"):
        Worker().submit(ExecuteStep(step_id=0))


def test_unknown_method_names_the_near_one(checkpoints: Any, serve: Any) -> None:
    worker = serve(checkpoints("llama").folder).worker
    reply = worker.call(CallMethod(call_id=4, method="rng_digest"))
    assert reply.call_id == 4
    assert reply.error is not None
    assert "Did you mean 'rng_digests'?" in reply.error.message


@pytest.mark.parametrize(
    ("method", "args"), [("ping", [1]), ("kv_cache_digest", []), ("kv_cache_digest", [[-1]]), ("kv_cache_digest", [3])]
)
def test_wrong_arguments_are_an_error_of_the_call(
    method: str, args: list[object], checkpoints: Any, serve: Any
) -> None:
    worker = serve(checkpoints("llama").folder).worker
    assert worker.call(CallMethod(call_id=1, method=method, args=args)).error is not None
    assert worker.call(CallMethod(call_id=2, method="ping")).result == "pong"
