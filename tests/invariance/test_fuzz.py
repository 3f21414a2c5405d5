"""Random lives of an engine: requests arrive, wait beside others, are aborted, paused, preempted, drafted for.

Whatever happened before and beside it, every finished request must equal the same request alone in a fresh engine, bit
for bit, and may only reuse cached blocks of its own salt. A failure is shrunk to a short sequence of calls. The plain
run is the same each time; SEMPRE_FUZZ_SECONDS=3600 looks for new ones that long, each printed so that it can be kept as
a case of its own.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from workload import KV_BLOCK_BYTES, launch_inproc, make_requests, run_alone

from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, compare_generations
from sempre.engine.harness.generation import apply_delta
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    GetMetrics,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    ResetPrefixCache,
    ResumeRequests,
)

SECONDS = float(os.environ.get("SEMPRE_FUZZ_SECONDS", "0"))
EXAMPLES = settings(
    max_examples=20,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TEMPLATES = make_requests()
SPECULATION: list[dict[str, Any] | None] = [
    None,
    {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False},
    {"method": "suffix", "num_speculative_tokens": 4},
]
ENGINES = st.fixed_dictionaries(
    {
        "max_num_seqs": st.sampled_from([1, 2, 3, 8]),
        "max_num_batched_tokens": st.sampled_from([16, 33, 64, 256]),
        # 34 blocks hold the longest request alone, so that others are preempted; that is drawn more often
        "kv_cache_memory_bytes": st.sampled_from([34 * KV_BLOCK_BYTES, 34 * KV_BLOCK_BYTES, 400 * KV_BLOCK_BYTES]),
        "enable_prefix_caching": st.booleans(),
        "speculative_config": st.sampled_from(SPECULATION),
    }
)


class EngineLife(RuleBasedStateMachine):
    """What happens to one engine."""

    numerics: ClassVar[str] = "invariant"

    @initialize(engine=ENGINES)
    def start(self, engine: dict[str, Any]) -> None:
        self.client: InprocClient = launch_inproc(numerics=self.numerics, **engine)
        self.template_of: dict[str, int] = {}
        self.results: dict[str, Generation] = {}
        self.running: dict[str, None] = {}
        self.paused: dict[str, None] = {}
        self.salts: set[str | None] = set()
        self.first_of_salt: set[str] = set()

    @rule(
        templates=st.lists(st.integers(0, len(TEMPLATES) - 1), min_size=1, max_size=6),
        salt=st.sampled_from([None, "a", "b"]),
    )
    def ask(self, templates: list[int], salt: str | None) -> None:
        """Some requests arrive together."""
        requests = []
        for template in templates:
            name = str(len(self.template_of))
            changes: dict[str, Any] = {"request_id": name, "ordinal": len(self.template_of), "cache_salt": salt}
            requests.append(msgspec.structs.replace(TEMPLATES[template], **changes))
            self.template_of[name], self.results[name], self.running[name] = template, Generation(name), None
        if salt not in self.salts:
            self.salts.add(salt)
            self.first_of_salt.add(requests[0].request_id)
        self.client.send(AddRequests(requests=requests))

    @rule(events=st.integers(1, 12))
    def compute(self, events: int) -> None:
        for _ in range(events):
            if not self.running.keys() - self.paused.keys():
                return
            self.receive()

    @precondition(lambda self: self.running)
    @rule(place=st.integers(0, 7))
    def abort(self, place: int) -> None:
        name = list(self.running)[place % len(self.running)]
        self.client.send(AbortRequests(request_ids=[name]))
        del self.running[name], self.results[name]
        self.paused.pop(name, None)

    @precondition(lambda self: self.running)
    @rule(place=st.integers(0, 7))
    def pause(self, place: int) -> None:
        name = list(self.running)[place % len(self.running)]
        self.client.send(PauseRequests(request_ids=[name]))
        self.paused[name] = None

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        self.client.send(ResumeRequests(request_ids=list(self.paused)))
        self.paused.clear()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.client.send(ResetPrefixCache(call_id=len(self.template_of)))

    def receive(self) -> None:
        event = self.client.receive(0.0)
        if not isinstance(event, OutputsReady):
            return
        for delta in event.outputs:
            if delta.request_id in self.running:
                apply_delta(self.results[delta.request_id], delta)
                if delta.finish_reason is not None:
                    del self.running[delta.request_id]
                    self.paused.pop(delta.request_id, None)

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            if self.paused:
                self.resume()
            while self.running:
                self.receive()
            was_preempted = self.num_preemptions() > 0
        finally:
            self.client.close()
        for name, found in self.results.items():
            expected = run_alone(self.numerics)[self.template_of[name]]
            comparison = compare_generations([expected], [found])
            assert comparison.equal, comparison.first_difference
            # a request that comes back after a preemption may find its own blocks
            if name in self.first_of_salt and not was_preempted:
                assert not found.num_cached_tokens, "blocks of another salt were reused"

    def num_preemptions(self) -> float:
        self.client.send(GetMetrics(call_id=0))
        while not isinstance(reply := self.client.receive(0.0), MetricsReply):
            pass
        value = reply.values["num_preemptions"]
        return sum(value) if isinstance(value, list) else 0.0


def test_random_lives() -> None:
    run_state_machine_as_test(EngineLife, settings=EXAMPLES)


def test_the_ordinary_matmul_is_noticed() -> None:
    class WithControl(EngineLife):
        numerics = "control"

    with pytest.raises(AssertionError, match="request 0 "):
        run_state_machine_as_test(WithControl, settings=settings(EXAMPLES, phases=[Phase.generate]))


@pytest.mark.skipif(not SECONDS, reason="SEMPRE_FUZZ_SECONDS says how long to look for new cases")
@pytest.mark.timeout(SECONDS + 900)
def test_new_lives() -> None:
    end, number = time.monotonic() + SECONDS, int(time.time())
    while time.monotonic() < end:
        number += 1
        print(f"seed {number}")
        machine = seed(number)(type("EngineLife", (EngineLife,), {}))
        run_state_machine_as_test(machine, settings=settings(EXAMPLES, derandomize=False))
