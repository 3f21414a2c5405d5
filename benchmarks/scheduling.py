"""Speed of scheduling alone: how many decisions per second `Scheduler.schedule` and `Scheduler.update` make together.

A decision is one request in one step. No model runs: a scripted worker answers every step at once, outside the
measured time. Run it as `python benchmarks/scheduling.py`; it prints a table and ends with one line of JSON.

    decode    256 requests, nothing but decoding
    churn     256 running requests out of 2,000 that come and go, prompts in chunks beside decoding
    shared    the same with a common prefix of 256 tokens, found in the prefix cache
    pressure  the same with a third of the KV cache they need, so that requests are preempted
    queue     churn with 10,000 requests, so that up to 9,744 wait, and 1,000,000 blocks
    wide      1,024 requests, nothing but decoding
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from sempre.engine.scheduling import Limits, Scheduler
from sempre.ipc.messages import ExecuteStep, RequestSpec, SampledTokens, SamplingSpec, StepResult

TARGET_PER_SECOND = 20_000


@dataclass(frozen=True)
class Scenario:
    name: str
    num_requests: int
    prompt_lengths: range
    output_lengths: range
    num_blocks: int
    shared_prefix: int = 0
    max_num_seqs: int = 256


SCENARIOS = [
    Scenario("decode", 256, range(16, 17), range(512, 513), 16_384),
    Scenario("churn", 2_000, range(64, 512), range(32, 192), 16_384),
    Scenario("shared", 2_000, range(320, 512), range(32, 192), 16_384, shared_prefix=256),
    Scenario("pressure", 2_000, range(64, 512), range(32, 192), 2_600),
    Scenario("queue", 10_000, range(64, 512), range(32, 192), 1_000_000),
    Scenario("wide", 1_024, range(16, 17), range(256, 257), 32_768, max_num_seqs=1_024),
]


@dataclass
class Figures:
    scenario: str
    decisions: int
    steps: int
    seconds: float
    decisions_per_second: int
    microseconds_per_step: float
    preemptions: int
    cached_tokens: int


def numbers(seed: int) -> Iterator[int]:
    """A fixed sequence of 31-bit integers."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield state >> 33


def requests(scenario: Scenario) -> list[RequestSpec]:
    draw = numbers(1)
    shared = [next(draw) % 32_000 for _ in range(scenario.shared_prefix)]
    specs = []
    for ordinal in range(scenario.num_requests):
        length = scenario.prompt_lengths[next(draw) % len(scenario.prompt_lengths)]
        max_tokens = scenario.output_lengths[next(draw) % len(scenario.output_lengths)]
        prompt = shared + [next(draw) % 32_000 for _ in range(length - len(shared))]
        params = SamplingSpec(max_tokens=max_tokens, eos_token_ids=[32_001])
        specs.append(
            RequestSpec(
                request_id=f"request-{ordinal}", prompt_token_ids=prompt, params=params, seed=ordinal, ordinal=ordinal
            )
        )
    return specs


def answer(step: ExecuteStep, lengths: dict[str, int]) -> StepResult:
    """One token for every request whose last known token was computed."""
    for new in step.new_requests:
        lengths[new.request_id] = len(new.token_ids)
    sampled = []
    for item in step.scheduled:
        token_ids = []
        if item.num_computed_tokens + item.num_tokens == lengths[item.request_id]:
            token_ids = [lengths[item.request_id] % 32_000]
            lengths[item.request_id] += 1
        sampled.append(SampledTokens(request_id=item.request_id, token_ids=token_ids))
    return StepResult(rank=0, step_id=step.step_id, sampled=sampled)


def measure(scenario: Scenario) -> Figures:
    limits = Limits(
        num_blocks=scenario.num_blocks,
        block_size=16,
        max_model_len=4_096,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=2_048,
    )
    scheduler = Scheduler(limits, policy="fcfs", enable_prefix_caching=True)
    for spec in requests(scenario):
        scheduler.add(spec)
    lengths: dict[str, int] = {}
    decisions = 0
    seconds = 0.0
    gc.collect()
    while scheduler.has_unfinished():
        start = time.perf_counter()
        step = scheduler.schedule()
        seconds += time.perf_counter() - start
        assert step is not None
        decisions += len(step.scheduled)
        result = answer(step, lengths)
        start = time.perf_counter()
        scheduler.update(step, result)
        seconds += time.perf_counter() - start
    scheduler.check_invariants()
    stats = scheduler.stats()
    return Figures(
        scenario=scenario.name,
        decisions=decisions,
        steps=stats.num_steps,
        seconds=round(seconds, 4),
        decisions_per_second=round(decisions / seconds),
        microseconds_per_step=round(1e6 * seconds / stats.num_steps, 1),
        preemptions=stats.num_preemptions,
        cached_tokens=stats.prefix_cache_hits,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, action="append", help="only this one; may be repeated")
    chosen = parser.parse_args().scenario or names
    print(f"{'scenario':10} {'decisions':>10} {'steps':>7} {'µs/step':>9} {'decisions/s':>12} {'preemptions':>12}")
    results = []
    for scenario in SCENARIOS:
        if scenario.name in chosen:
            row = measure(scenario)
            results.append(row)
            print(
                f"{row.scenario:10} {row.decisions:10,} {row.steps:7,} {row.microseconds_per_step:9,.0f} "
                f"{row.decisions_per_second:12,} {row.preemptions:12,}"
            )
    slowest = min(row.decisions_per_second for row in results)
    document = {
        "benchmark": "scheduling",
        "slowest_decisions_per_second": slowest,
        "target_per_second": TARGET_PER_SECOND,
        "reached": slowest >= TARGET_PER_SECOND,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "scenarios": [asdict(row) for row in results],
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
