"""The axes for a model whose layers keep states: with few blocks and slots, so that states are evicted, snapshots are
read, drafts are verified and requests are computed again, every result is that of the request alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from drafters import drafting_with
from hybrid_checkpoint import SLOT_BYTES, hybrid_settings, write_hybrid_checkpoint
from surfaces import facts, stream_all
from workload import make_requests

from sempre.engine import LLM, SamplingParams
from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Cluster, Generation, compare_generations, generate
from sempre.ipc.messages import AddRequests, GetMetrics, MetricsReply, OutputsReady, RequestSpec


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid_checkpoint(tmp_path_factory.mktemp("hybrid"))


def launch(folder: Path, **settings: Any) -> InprocClient:
    return InprocClient.launch(engine_config(**hybrid_settings(folder, multiprocessing=False, **settings)))


def run(folder: Path, requests: Sequence[RequestSpec], **settings: Any) -> tuple[list[Generation], dict[str, Any]]:
    """All requests at once; their results, and the metrics."""
    client = launch(folder, **settings)
    try:
        return generate(client, requests), metrics(client)
    finally:
        client.close()


def metrics(client: InprocClient) -> dict[str, Any]:
    client.send(GetMetrics(call_id=1))
    reply = client.receive()
    assert isinstance(reply, MetricsReply)
    return reply.values


@cache
def run_alone(folder: Path, numerics: str) -> tuple[Generation, ...]:
    client = launch(folder, enable_prefix_caching=False, numerics=numerics)
    try:
        return tuple(generate(client, [request])[0] for request in make_requests())
    finally:
        client.close()


def check(folder: Path, numerics: str, found: Sequence[Generation]) -> None:
    """Equal to the lone runs; with the ordinary matmul, not."""
    comparison = compare_generations(run_alone(folder, numerics), found)
    if numerics == "invariant":
        assert comparison.equal, comparison.first_difference
    else:
        assert not comparison.equal, "the control gave equal bits: this test could not notice a difference"


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 3}, {"max_num_seqs": 12, "max_num_batched_tokens": 33}, {"enable_prefix_caching": False}],
    ids=str,
)
def test_batches_and_chunks(folder: Path, requests: list[RequestSpec], numerics: str, settings: dict[str, Any]) -> None:
    """A1, A3."""
    check(folder, numerics, run(folder, requests, numerics=numerics, **settings)[0])


def test_order(folder: Path, requests: list[RequestSpec], numerics: str) -> None:
    """A2."""
    backwards = [msgspec.structs.replace(r, ordinal=len(requests) - r.ordinal) for r in reversed(requests)]
    check(folder, numerics, run(folder, backwards, numerics=numerics, max_num_seqs=5)[0][::-1])


@pytest.mark.parametrize(("num_blocks", "num_slots"), [(110, 12), (110, 24)])
def test_prefix_cache(
    folder: Path, requests: list[RequestSpec], numerics: str, num_blocks: int, num_slots: int
) -> None:
    """A4: cold, warm, and partly evicted: blocks, snapshots, or both."""
    client = launch(folder, numerics=numerics, max_num_seqs=6, num_blocks=num_blocks, num_slots=num_slots)
    try:
        rounds = [
            generate(client, [msgspec.structs.replace(r, request_id=f"{n}-{r.request_id}") for r in requests])
            for n in range(3)
        ]
    finally:
        client.close()
    for found in rounds:
        check(folder, numerics, found)
    cached = [generation.num_cached_tokens for generation in rounds[2]]
    whole = [(len(r.prompt_token_ids) - 1) // 16 * 16 for r in requests if r.params.prompt_logprobs is None]
    assert 0 < sum(cached) < sum(whole)


@pytest.mark.parametrize("num_slots", [12, 13, 14])
def test_preemption(folder: Path, requests: list[RequestSpec], numerics: str, num_slots: int) -> None:
    """A5: too few blocks for all; those computed again resume from a snapshot where there is one."""
    settings = {"max_num_seqs": 12, "num_blocks": 27, "num_slots": num_slots, "max_num_batched_tokens": 64}
    found, counted = run(folder, requests, numerics=numerics, **settings)
    assert counted["num_preemptions"] > [0.0]
    check(folder, numerics, found)


@pytest.mark.parametrize(
    ("num_slots", "share_right"),
    [
        pytest.param(*pair, marks=[] if pair in ((6, 0.5), (8, 0.5), (24, 0.0), (24, 1.0)) else [pytest.mark.product])
        for pair in product((6, 8, 24), (0.0, 0.5, 1.0))
    ],
)
def test_speculation(folder: Path, requests: list[RequestSpec], share_right: float, num_slots: int) -> None:
    """A9: drafts that are wrong, half right, or right; each takes a slot, and where there is none, there is none."""
    alone = run_alone(folder, "invariant")
    sequences = [request.prompt_token_ids + one.token_ids for request, one in zip(requests, alone, strict=True)]
    config = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    settings = {"max_num_seqs": 6, "num_blocks": 27, "num_slots": num_slots, "speculative_config": config}
    with drafting_with(sequences, share_right):
        found, counted = run(folder, requests, **settings)
    check(folder, "invariant", found)
    assert (counted["spec_decode_num_draft_tokens"][0] > 0) == (num_slots > 6)
    assert (counted["spec_decode_num_accepted_tokens"][0] > 0) == (num_slots > 6 and share_right > 0)


def test_speculation_with_the_ordinary_matmul_fails(folder: Path, requests: list[RequestSpec]) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    alone = run_alone(folder, "control")
    sequences = [request.prompt_token_ids + one.token_ids for request, one in zip(requests, alone, strict=True)]
    with drafting_with(sequences, 1.0):
        check(folder, "control", run(folder, requests, numerics="control", speculative_config=config)[0])


@pytest.mark.parametrize(
    ("placement", "room"),
    [
        ("colocated", {}),
        ("worker", {}),
        pytest.param("colocated", {"max_num_seqs": 5, "max_num_batched_tokens": 33}, marks=pytest.mark.product),
        pytest.param("worker", {"max_num_seqs": 5, "enable_prefix_caching": False}, marks=pytest.mark.product),
    ],
)
@pytest.mark.parametrize("draft", ["tiny-draft", pytest.param("itself", marks=pytest.mark.product)])
def test_a_draft_model(
    folder: Path, requests: list[RequestSpec], placement: str, draft: str, room: dict[str, Any]
) -> None:
    """A9: a draft model without states drafts for one with them, and so does one with states: the model itself, whose
    drafts are right, so that the draft model's states are those of the target."""
    config = {
        "method": "draft_model",
        "model": str(folder) if draft == "itself" else draft,
        "placement": placement,
        "num_speculative_tokens": 4,
        "adaptive": False,
    }
    found, counted = run(folder, requests, speculative_config=config, **room)
    check(folder, "invariant", found)
    drafted, accepted = (counted[f"spec_decode_num_{kind}_tokens"][0] for kind in ("draft", "accepted"))
    assert drafted > 0
    # all but those past the end of a request
    assert draft != "itself" or accepted > 0.9 * drafted


@pytest.mark.parametrize("preempting", [False, pytest.param(True, marks=pytest.mark.product)])
def test_a_draft_model_with_states_for_one_without(folder: Path, requests: list[RequestSpec], preempting: bool) -> None:
    """A5, A9: its states take memory that is counted, and its drafts are seldom right."""
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4, "adaptive": False}
    room = {"kv_cache_memory_bytes": 1_000_000 + 24 * SLOT_BYTES} if preempting else {}
    results = []
    for changes in ({}, {"speculative_config": config, **room}):
        settings: dict[str, Any] = {"load_format": "dummy", "num_threads": 1, "max_model_len": 384, "max_num_seqs": 12}
        client = InprocClient.launch(engine_config("tiny", multiprocessing=False, **settings, **changes))
        try:
            results.append(generate(client, requests))
            counted = metrics(client)
        finally:
            client.close()
    comparison = compare_generations(*results)
    assert comparison.equal, comparison.first_difference
    assert counted["spec_decode_num_draft_tokens"] > [0.0]
    assert (counted["num_preemptions"] > [0.0]) == preempting


def test_processes_and_replicas(folder: Path, requests: list[RequestSpec], numerics: str) -> None:
    """A7, A8: two replicas in processes of their own."""
    with Cluster(**hybrid_settings(folder, numerics=numerics, data_parallel_size=2)) as cluster:
        check(folder, numerics, cluster.generate(requests))


def collect(cluster: Cluster, requests: Sequence[RequestSpec], *, kill: bool) -> list[tuple[list[int], bytes]]:
    """Tokens and bits of log-probabilities; in the middle, the worker is killed or not."""
    cluster.client.send(AddRequests(requests=list(requests)))
    found: dict[str, tuple[list[int], bytes]] = {request.request_id: ([], b"") for request in requests}
    unfinished = set(found)
    while unfinished:
        event = cluster.client.receive(60)
        for delta in event.outputs if isinstance(event, OutputsReady) else ():
            tokens, bits = found[delta.request_id]
            found[delta.request_id] = (
                tokens + delta.token_ids,
                bits + (b"" if delta.logprobs is None else delta.logprobs.logprobs),
            )
            if delta.finish_reason is not None:
                unfinished.remove(delta.request_id)
        if kill and any(len(tokens) >= 3 for tokens, _ in found.values()):
            cluster.kill(0)
            kill = False
    assert not kill
    return list(found.values())


def test_crash(folder: Path, requests: list[RequestSpec]) -> None:
    """A11: the worker dies in the middle; its successor has no states, and computes all of them again."""
    with Cluster(**hybrid_settings(folder, max_num_seqs=6, num_blocks=60, num_slots=10)) as cluster:
        before = collect(cluster, requests, kill=False)
        assert collect(cluster, requests, kill=True) == before
        assert cluster.metrics()["worker_restarts"] == [1.0]
        assert collect(cluster, requests, kill=False) == before
    assert [tokens for tokens, _ in before] == [one.token_ids for one in run_alone(folder, "invariant")]


PROMPTS = ["It was the best of times", "A", "def add(a, b):\n    return a + b\n\ndef add(a,", "To the Senate and House"]
PARAMS = SamplingParams(temperature=1.0, seed=2024, max_tokens=24, logprobs=3, ignore_eos=True)


def surface(folder: Path, numerics: str, **settings: Any) -> LLM:
    return LLM(**hybrid_settings(folder, multiprocessing=False, numerics=numerics, **settings))


def outputs_of(llm: LLM, params: SamplingParams) -> list[Any]:
    return [output.outputs for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@cache
def lone(folder: Path, numerics: str, seed: int = 2024) -> list[Any]:
    with surface(folder, numerics, enable_prefix_caching=False) as llm:
        params = replace(PARAMS, seed=seed)
        return [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0] for prompt in PROMPTS]


def test_surfaces_siblings_and_reports(folder: Path, numerics: str) -> None:
    """A12, A13, A14."""
    with surface(folder, numerics) as llm:
        together = [facts(completions[0]) for completions in outputs_of(llm, PARAMS)]
        siblings = outputs_of(llm, replace(PARAMS, n=3))
        reported = outputs_of(llm, replace(PARAMS, logprobs=3, prompt_logprobs=2, detokenize=False))
    settings = hybrid_settings(folder, multiprocessing=False, numerics=numerics)
    streamed = asyncio.run(stream_all(settings, PROMPTS, PARAMS))
    alone = [[facts(one) for one in lone(folder, numerics, 2024 + i)] for i in range(3)]
    ids = [[completions[0].token_ids for completions in reported], [one.token_ids for one in lone(folder, numerics)]]
    if numerics == "invariant":
        assert together == streamed == alone[0]
        assert [[facts(completions[i]) for completions in siblings] for i in range(3)] == alone
        assert ids[0] == ids[1]
    else:
        assert [[facts(completions[i]) for completions in siblings] for i in range(3)] != alone


def test_scoring(folder: Path, numerics: str) -> None:
    """A15: scoring prompt + output gives the log-probabilities that were given while generating."""
    with surface(folder, numerics, max_num_batched_tokens=20) as llm:
        outputs = llm.generate(PROMPTS, replace(PARAMS, temperature=1.3, logprobs=0), use_tqdm=False)
        texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
        scored = llm.generate(
            [{"prompt_token_ids": text} for text in texts],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
    pairs = []
    for output, score in zip(outputs, scored, strict=True):
        start, ids = len(output.prompt_token_ids), output.outputs[0].token_ids
        rows = score.prompt_logprobs[start:]
        pairs.append(
            (
                [row[token].logprob.hex() for row, token in zip(output.outputs[0].logprobs, ids, strict=True)],
                [row[token].logprob.hex() for row, token in zip(rows, ids, strict=True)],
            )
        )
    assert all(a == b for a, b in pairs) == (numerics == "invariant")


def test_unseeded_requests(folder: Path) -> None:
    """A19: the seed of a request without one depends on none of those beside it."""
    params = replace(PARAMS, seed=None)
    with surface(folder, "invariant") as llm:
        together = [facts(completions[0]) for completions in outputs_of(llm, params)]
    with surface(folder, "invariant") as llm:
        backwards = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0] for prompt in reversed(PROMPTS)]
    assert [facts(one) for one in reversed(backwards)] == together


def test_slots_that_do_not_fit_are_refused_with_the_sums(folder: Path) -> None:
    with pytest.raises(Exception, match=r"max_num_seqs: 64 requests keep states of 58368 bytes each = 3735552 bytes"):
        launch(folder, max_num_seqs=64, kv_cache_memory_bytes=3_000_000).close()


def test_states_of_a_draft_model_that_do_not_fit_are_refused_with_the_sums(folder: Path) -> None:
    config = {"method": "draft_model", "model": str(folder)}
    with pytest.raises(Exception, match=r"less 7471104 bytes of the draft model's states = 0 bytes"):
        launch(folder, max_num_seqs=64, kv_cache_memory_bytes=5_000_000, speculative_config=config)
