"""The whole worker, through its messages: bits against other chunks and batches, values against transformers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from sampling_reference import gumbel_noise

from sempre.ipc.messages import CallMethod, LogprobRows, SamplingSpec, ScheduledRequest
from sempre.workers import worker
from sempre.workers.seeding import rng_digests
from sempre.workers.warm_up import warm_up

GREEDY = SamplingSpec(max_tokens=6, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
RANDOM = SamplingSpec(max_tokens=6, temperature=0.9, logprobs=-1, prompt_logprobs=-1)

FAMILIES = [
    "llama",
    "llama-multi-head-tied",
    "llama-biases",
    "llama-llama3-rope",
    "llama-linear-rope",
    "llama-head-dim",
    "mistral-window",
    "qwen2",
    "qwen2-upper-window",
    "qwen3",
    "qwen3-biases",
    "gemma2",
    "gemma2-odd",
    "qwen3-moe",
    "qwen3-moe-odd",
    "qwen3-moe-step",
    "qwen2-moe",
    "qwen2-moe-odd",
    "glm",
    "glm4",
    "glm4-odd",
    "glm4-moe",
    "glm4-moe-odd",
    "mixtral",
    "mixtral-odd",
]


def prompt_ids(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def packed(rows: list[LogprobRows]) -> tuple[bytes, bytes, bytes]:
    """The rows' bits, however they were spread over steps."""
    return (
        b"".join(part.token_ids for part in rows),
        b"".join(part.logprobs for part in rows),
        b"".join(part.ranks for part in rows),
    )


def outcome(finished: Any) -> tuple[object, ...]:
    assert finished.errors == []
    return finished.token_ids, packed(finished.logprobs), packed(finished.prompt_logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_equal_transformers_and_bits_equal_each_other(
    family: str, checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    checkpoint = checkpoints(family)
    serving = serve(checkpoint.folder)
    ids = prompt_ids(90)
    whole = serving.run(prompt("whole", ids, GREEDY))["whole"]
    assert len(whole.token_ids) == GREEDY.max_tokens

    sequence = torch.tensor([ids + whole.token_ids])
    with torch.no_grad():
        expected = torch.log_softmax(checkpoint.model(sequence).logits[0].double(), dim=-1)[:-1]
    found = torch.cat([dense(whole.prompt_logprobs, 320), dense(whole.logprobs, 320)]).double()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5

    for chunks in ((1, 63, 10), (64, 7), (16,), (1,)):
        assert outcome(serving.run(prompt("cut", ids, GREEDY, chunks=chunks))["cut"]) == outcome(whole)


def test_a_token_is_the_best_under_the_noise_of_its_own_position(
    checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    """Positions count from the start of the sequence: the first output after P prompt tokens is at P."""
    ids, seed = prompt_ids(21), 2**40 + 11
    params = replace(RANDOM, temperature=1.0, max_tokens=8)
    found = serve(checkpoints("llama").folder).run(prompt("a", ids, params, seed=seed))["a"]
    rows = dense(found.logprobs, 320).numpy()
    noisy = [row + gumbel_noise(seed, len(ids) + index, 320) for index, row in enumerate(rows)]
    assert found.token_ids == [int(row.argmax()) for row in noisy]
    assert found.token_ids != rows.argmax(axis=1).tolist()


def test_penalties_see_every_token_before_the_position(
    checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any
) -> None:
    params = replace(GREEDY, presence_penalty=2.0, max_tokens=12)
    found = serve(checkpoints("llama").folder).run(prompt("a", prompt_ids(21), params))["a"]
    rows = dense(found.logprobs, 320).numpy().copy()
    for index, row in enumerate(rows):
        row[list(set(found.token_ids[:index]))] -= np.float32(2.0)
    assert found.token_ids == rows.argmax(axis=1).tolist()


def test_bits_do_not_depend_on_companions(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("qwen3").folder)
    wanted = prompt("wanted", prompt_ids(37), RANDOM, seed=11)
    alone = serving.run(wanted)["wanted"]
    others = [
        prompt(f"other-{i}", prompt_ids(5 + 9 * i, salt=i + 1), RANDOM, seed=i, chunks=(3 + i,)) for i in range(7)
    ]
    for position in (0, 3, 7):
        together = serving.run(*others[:position], wanted, *others[position:])
        assert outcome(together["wanted"]) == outcome(alone)


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_resumed_request_continues_with_the_same_bits(
    num_outputs: int, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    """A fresh worker gets prompt and outputs so far, as after preemption or a crash."""
    folder = checkpoints("llama").folder
    ids = prompt_ids(30)
    params = SamplingSpec(
        max_tokens=6,
        temperature=0.8,
        logprobs=3,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        bad_words_token_ids=[[5, 6]],
    )
    full = serve(folder).run(prompt("a", ids, params, seed=3))["a"]
    known = ids + full.token_ids[:num_outputs]
    rest_params = replace(params, max_tokens=6 - num_outputs)
    rest = serve(folder).run(prompt("b", known, rest_params, seed=3, num_prompt_tokens=len(ids)))["b"]
    assert rest.token_ids == full.token_ids[num_outputs:]
    assert packed(rest.logprobs) == packed(full.logprobs[num_outputs:])


def test_prompt_logprobs_equal_the_logprobs_of_generation(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("mistral-window").folder)
    ids = prompt_ids(40)
    generated = serving.run(prompt("generate", ids, RANDOM, seed=5))["generate"]
    score = SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    scored = serving.run(prompt("score", ids + generated.token_ids, score, chunks=(33, 5)))["score"]
    rows = packed(scored.prompt_logprobs)
    for found, expected in zip(rows, packed(generated.prompt_logprobs + generated.logprobs), strict=True):
        assert found == expected


def test_prompt_logprobs_are_reported_from_the_start_asked_for(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("llama").folder)
    ids = prompt_ids(150)
    params = SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    everything = serving.run(prompt("all", ids, params))["all"].prompt_logprobs
    assert [part.num_rows for part in everything] == [149]
    part = serving.run(prompt("part", ids, params, chunks=(70, 10), prompt_logprobs_start=100))["part"].prompt_logprobs
    # the chunk [90, 100) reports position 100, whose row is computed at 99
    assert [rows.num_rows for rows in part] == [1, 10, 10, 10, 10, 9]
    tail = packed(everything)[1][-50 * 3 * 4 :]
    assert packed(part)[1] == tail


def test_reporting_does_not_change_tokens(checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("qwen2").folder)
    silent = SamplingSpec(max_tokens=6, temperature=0.9)
    ids = prompt_ids(21)
    with_logprobs = serving.run(prompt("a", ids, RANDOM, seed=9))["a"]
    without = serving.run(prompt("b", ids, silent, seed=9))["b"]
    assert without.token_ids == with_logprobs.token_ids
    assert without.logprobs == without.prompt_logprobs == []


def test_a_worker_restarted_gives_equal_bits_and_fingerprint(checkpoints: Any, serve: Any, prompt: Any) -> None:
    folder = checkpoints("llama-biases").folder
    first, second = serve(folder), serve(folder)
    assert first.loaded.fingerprint == second.loaded.fingerprint
    assert first.ready.digests_after_warm_up == second.ready.digests_after_warm_up
    ids = prompt_ids(50)
    assert outcome(first.run(prompt("a", ids, RANDOM, seed=1))["a"]) == outcome(
        second.run(prompt("b", ids, RANDOM, seed=1))["b"]
    )


def test_bits_do_not_depend_on_threads(checkpoints: Any, serve: Any, prompt: Any) -> None:
    folder = checkpoints("qwen3").folder
    requests = [prompt(f"r{i}", prompt_ids(60 + i, salt=i), RANDOM, seed=i) for i in range(4)]
    one = serve(folder, num_threads=1).run(*requests)
    assert serve(folder, num_threads=min(2, len(os.sched_getaffinity(0)))).run(*requests) == one


def test_more_requests_may_be_known_than_run(checkpoints: Any, serve: Any, prompt: Any) -> None:
    """Preempted requests stay known; here six of them while two at most are in a step."""
    serving = serve(checkpoints("llama").folder, max_num_seqs=2)
    params = SamplingSpec(max_tokens=3, temperature=0.8)
    requests = [prompt(f"r{i}", prompt_ids(20, salt=i), params, seed=i) for i in range(6)]
    expected = [serving.run(request)[request.request_id].token_ids for request in requests]
    serving.step([], [serving.new_request(request) for request in requests])
    found: list[list[int]] = [[] for _ in requests]
    for step in range(3):
        for first in (0, 2, 4):
            pair = [
                ScheduledRequest(
                    request_id=f"r{i}",
                    num_computed_tokens=0 if step == 0 else 19 + step,
                    num_tokens=20 if step == 0 else 1,
                    block_table_start=0 if step == 0 else 2,
                    block_ids=[2 * i, 2 * i + 1] if step == 0 else [],
                )
                for i in (first, first + 1)
            ]
            for i, result in zip((first, first + 1), serving.step(pair), strict=True):
                found[i] += result.token_ids
    assert found == expected


def test_control_numerics_make_bits_depend_on_companions(checkpoints: Any, serve: Any, prompt: Any) -> None:
    """The negative control: the same comparison with the ordinary matmul fails."""
    serving = serve(checkpoints("llama").folder, numerics="control")
    assert serving.loaded.fingerprint["numerics"] == "control"
    ids = prompt_ids(90)
    whole = serving.run(prompt("whole", ids, GREEDY))["whole"]
    cut = serving.run(prompt("cut", ids, GREEDY, chunks=(1,)))["cut"]
    assert packed(cut.prompt_logprobs) != packed(whole.prompt_logprobs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_storage_keeps_the_guarantee(dtype: str, checkpoints: Any, serve: Any, prompt: Any) -> None:
    serving = serve(checkpoints("qwen3").folder, dtype=dtype)
    assert serving.loaded.fingerprint["dtype"] == serving.loaded.fingerprint["storage"] == dtype
    ids = prompt_ids(75)
    whole = serving.run(prompt("whole", ids, GREEDY))["whole"]
    assert outcome(serving.run(prompt("cut", ids, GREEDY, chunks=(1, 64, 3)))["cut"]) == outcome(whole)


def test_warm_up_leaves_no_trace_in_the_cache(checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder)
    call = CallMethod(call_id=1, method="kv_cache_digest", args=[[0, 1]])
    untouched = CallMethod(call_id=2, method="kv_cache_digest", args=[[40, 41]])
    assert serving.worker.call(call).result == serving.worker.call(untouched).result


def test_what_loading_and_warm_up_draw_is_forgotten(
    checkpoints: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker serves with the states of its seed, whatever drew from its generators before."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def draw_and_warm_up(runner: Any) -> None:
        random.random()
        np.random.rand()
        torch.rand(1)
        warm_up(runner)

    monkeypatch.setattr(worker, "warm_up", draw_and_warm_up)
    try:
        serving = serve(checkpoints("llama").folder, seed=11)
        assert serving.ready.digests_after_warm_up == serving.loaded.digests_before_load == rng_digests()
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def test_the_fingerprint_names_the_number_of_threads(checkpoints: Any, serve: Any) -> None:
    folder = checkpoints("llama").folder
    assert [serve(folder, num_threads=n).loaded.fingerprint["threads"] for n in (2, 1)] == ["2", "1"]
