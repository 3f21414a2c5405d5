"""Draft workers: held to the target's seed and tokens, and missed by nobody when they die or stall."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Cluster, Generation, compare_generations, generate, make_request
from sempre.ipc.errors import ConfigError, ModelError, SeedMismatch
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineNotice, OutputsReady, RequestSpec

DRAFTING = {
    "method": "draft_model",
    "model": "tiny-draft",
    "num_speculative_tokens": 4,
    "placement": "worker",
    "adaptive": False,
}
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 1}


def specs(count: int, max_tokens: int) -> list[RequestSpec]:
    return [
        make_request(
            [5 + i, 300 + i, 7],
            seed=i,
            ordinal=i,
            max_tokens=max_tokens,
            temperature=(0.0, 0.7, 1.0)[i % 3],
            logprobs=1,
        )
        for i in range(count)
    ]


class Watched:
    """A client that acts once that many tokens have come, and keeps the notices."""

    def __init__(self, client: EngineClient, at_tokens: int, act: Callable[[], None]) -> None:
        self._client = client
        self._at_tokens = at_tokens
        self._act = act
        self._tokens = 0
        self.notices: list[str] = []
        self.ready = client.ready

    def send(self, command: ClientCommand) -> None:
        self._client.send(command)

    def receive(self, timeout_s: float | None = None) -> ClientEvent | None:
        event = self._client.receive(timeout_s)
        if isinstance(event, EngineNotice):
            self.notices.append(event.message)
        if isinstance(event, OutputsReady):
            before = self._tokens
            self._tokens += sum(len(delta.token_ids) for delta in event.outputs)
            if before < self._at_tokens <= self._tokens:
                self._act()
        return event

    def close(self) -> None:
        self._client.close()


def accepted(cluster: Cluster) -> float:
    """By the replica with the fewest."""
    return float(min(cluster.metrics()["spec_decode_num_accepted_tokens"]))


def generate_until_drafts_are_accepted(cluster: Cluster) -> None:
    before, deadline = accepted(cluster), time.monotonic() + 60
    while accepted(cluster) == before:
        assert time.monotonic() < deadline, "the draft worker has not come back"
        cluster.generate(specs(4, 8))


@pytest.fixture(scope="module")
def expected() -> list[Generation]:
    client = InprocClient.launch(engine_config("tiny", multiprocessing=False, **SETTINGS))
    try:
        return generate(client, specs(48, 40))
    finally:
        client.close()


def test_a_stalled_or_killed_draft_worker_costs_no_request(expected: list[Generation]) -> None:
    """In the middle of 48 requests; each is said once, and the worker or a new one goes on drafting."""
    with Cluster("tiny", speculative_config=DRAFTING, **SETTINGS) as cluster:
        (pid,) = cluster.ready.draft_worker_pids
        for number, notice in (
            (signal.SIGSTOP, r".* has not answered within 0\.5 s"),
            (signal.SIGKILL, r"a draft worker has failed: draft worker 0 \(pid \d+\) died: .*SIGKILL.*restarted"),
        ):
            before = accepted(cluster)
            watched = Watched(cluster.client, 500, partial(os.kill, pid, number))
            comparison = compare_generations(expected, generate(watched, specs(48, 40)))
            assert comparison.equal, comparison.first_difference
            assert accepted(cluster) > before
            assert [re.match(notice, found) is not None for found in watched.notices] == [True]
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
            generate_until_drafts_are_accepted(cluster)
        assert compare_generations(expected, cluster.generate(specs(48, 40))).equal


def test_a_draft_worker_that_pauses_again_and_again_hangs_nobody(expected: list[Generation]) -> None:
    """Requests that were queued while it was asked about others go on, too; so do those that come while it is late."""
    with Cluster("tiny", speculative_config=DRAFTING, **SETTINGS) as cluster:
        (pid,) = cluster.ready.draft_worker_pids
        pausing = threading.Event()

        def pause() -> None:
            while not pausing.is_set():
                os.kill(pid, signal.SIGSTOP)
                pausing.wait(0.8)  # longer than it is waited for
                os.kill(pid, signal.SIGCONT)
                pausing.wait(0.1)

        thread = threading.Thread(target=pause)
        thread.start()
        try:
            for _ in range(3):
                comparison = compare_generations(expected, cluster.generate(specs(48, 40)))
                assert comparison.equal, comparison.first_difference
        finally:
            pausing.set()
            thread.join()
        assert cluster.ready.draft_worker_pids == [pid]
        generate_until_drafts_are_accepted(cluster)


@pytest.mark.parametrize("victims", [["draft 1"], ["draft 1", "target 0"], ["draft 0", "target 0", "draft 1"]])
def test_whoever_dies_every_request_ends_with_its_tokens(victims: list[str]) -> None:
    """At once, so that some start while others die; the draft workers of both replicas then go on."""
    drafting = {"worker_module": "light_worker", "speculative_config": DRAFTING, "data_parallel_size": 2}
    with Cluster("tiny", **drafting, **SETTINGS) as cluster:
        undisturbed = cluster.generate(specs(48, 40))
        pids = {"draft": cluster.ready.draft_worker_pids, "target": cluster.worker_pids()}
        assert len({*pids["draft"], *pids["target"]}) == 4

        def kill() -> None:
            for victim in victims:
                role, index = victim.split()
                os.kill(pids[role][int(index)], signal.SIGKILL)

        watched = Watched(cluster.client, 500, kill)
        comparison = compare_generations(undisturbed, generate(watched, specs(48, 40)))
        assert comparison.equal, comparison.first_difference
        expected = sorted(f"draft worker {victim[-1]}" for victim in victims if "draft" in victim)
        assert sorted(re.findall(r"draft worker \d", " ".join(watched.notices))) == expected
        generate_until_drafts_are_accepted(cluster)
        assert len(cluster.call("ping")) == 2, "draft workers answer no calls"


def test_a_draft_worker_with_another_seed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_TEST_ODDITY", "other-seed")
    text = "draft worker 0 is seeded differently from rank 0 before the model is loaded: python_random"
    with pytest.raises(SeedMismatch, match=text):
        Cluster("tiny", worker_module="draft_workers", speculative_config=DRAFTING, **SETTINGS)


@pytest.mark.parametrize("placement", ["colocated", "worker"])
def test_a_draft_model_with_other_tokens_is_refused(tmp_path: Path, placement: str) -> None:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path)
    drafting = {"method": "draft_model", "model": str(tmp_path), "placement": placement}
    config = engine_config("tiny", multiprocessing=False, speculative_config=drafting, **SETTINGS)
    with pytest.raises(
        ConfigError, match=r"draft model .* has a vocabulary of 320 tokens, and the model .* one of 4096"
    ):
        InprocClient.launch(config)


def test_a_draft_worker_that_cannot_start_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    drafting = {**DRAFTING, "model": str(tmp_path)}
    with pytest.raises(ModelError):
        Cluster("tiny", speculative_config=drafting, **SETTINGS)
