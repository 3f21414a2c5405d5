"""Stages that share a model's layers give the bits of one worker, for every family that can be cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from family_names import NAMES
from ranks import Ranks, on_all_ranks
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError, EngineUnhealthy, ProtocolError, StartupError
from sempre.ipc.messages import ExecuteStep, NewRequest, RequestOutcome, SamplingSpec, ScheduledRequest
from sempre.workers.cpu.replica_file import ReplicaFile
from sempre.workers.cpu.stage_runner import CpuStageRunner, parts_of
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.loading import load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.parallel import parallel_of
from sempre.workers.sampling import GrammarCompiler
from sempre.workers.stages import Stage, StageLink
from sempre.workers.step_validation import StepLimits

TOKENS = [(7919 * i + 11) % 320 for i in range(45)]
CUTS = (1, 18, 44)
# later layers of Gemma 4 read what earlier ones do
WHOLE = [name for name in NAMES if name.startswith("gemma4")]
CUT = [name for name in NAMES if name not in WHOLE]

Checkpoints = Callable[[str], Any]


def of(folder: Path, num_stages: int, size: int = 1, **settings: Any) -> Ranks:
    """The model on so many stages of so many ranks."""
    profile = "single" if size == 1 else "tree8"
    return Ranks(folder, size, num_stages=num_stages, **{"profile": profile, **settings})


def expected_of(folder: Path, **settings: Any) -> torch.Tensor:
    """What one worker computes, in one piece."""
    [logits] = of(folder, 1, **settings).logits(TOKENS)
    assert logits.isfinite().all()
    return logits


def check(ranks: Ranks, expected: torch.Tensor) -> None:
    for rank, found in enumerate(ranks.logits(TOKENS, CUTS)):
        assert torch.equal(found, expected), f"rank {rank} of the last stage"


@pytest.mark.parametrize("name", CUT)
def test_every_family_on_two_stages(name: str, checkpoints: Checkpoints) -> None:
    """Two layers and one."""
    folder = checkpoints(name).folder
    one, two = of(folder, 1), of(folder, 2)
    [expected] = one.logits(TOKENS)
    check(two, expected)
    assert {loaded.facts.digest for loaded in two.loaded} == {one.loaded[0].facts.digest}


@pytest.mark.parametrize("name", WHOLE)
def test_families_that_cannot_be_cut_are_refused(name: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size: stage \d: expected one stage for Gemma 4") as error:
        of(checkpoints(name).folder, 2)
    assert (error.value.parameter, error.value.value) == ("pipeline_parallel_size", 2)


@pytest.mark.parametrize(
    ("name", "num_stages", "size"),
    [("llama", 2, 1), ("llama", 3, 1), ("qwen3-moe", 3, 1), ("qwen3.5", 3, 1), ("qwen3-moe", 3, 2)],
)
def test_more_stages_and_ranks(name: str, num_stages: int, size: int, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name).folder
    profile = "single" if size == 1 else "tree8"
    check(of(folder, num_stages, size), expected_of(folder, profile=profile))


@pytest.mark.parametrize("settings", [{"quantization": "fp8"}, {"dtype": "bfloat16"}])
def test_formats(settings: dict[str, str], checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama-biases").folder
    check(of(folder, 2, **settings), expected_of(folder, **settings))


def test_stages_hold_parts(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3.5").folder
    whole, parts = of(folder, 1), of(folder, 3)
    assert sum(loaded.facts.nbytes for loaded in parts.loaded) < 1.3 * whole.loaded[0].facts.nbytes
    assert sum(cache.nbytes for cache in parts.caches) == whole.caches[0].nbytes
    states = [cache.states.nbytes for cache in parts.caches if cache.states is not None]
    assert sum(states) == whole.caches[0].states.nbytes  # type: ignore[union-attr]
    assert [loaded.model.model.own_layers for loaded in parts.loaded] == [
        Stage(index, 3).layers(len(whole.loaded[0].model.model.layers)) for index in range(3)
    ]
    names = [{path for path, _ in loaded.model.walk()} for loaded in parts.loaded]
    assert ["model.embed_tokens" in found for found in names] == [True, False, False]
    assert ["model.norm" in found and "lm_head" in found for found in names] == [False, False, True]


def test_control_another_bit_in_a_weight_of_one_stage(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama").folder
    ranks, expected = of(folder, 3), expected_of(folder)
    weight = ranks.loaded[1].model.model.layers[1].mlp.down_proj.weight
    weight.panels.view(torch.int32)[0, 3, 5] ^= 1 << 20
    assert not torch.equal(ranks.logits(TOKENS)[0], expected)


def test_more_stages_than_layers(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"stage \d: expected at most the model's 3 layers, found 4\.") as refused:
        of(checkpoints("llama").folder, 4)
    assert (refused.value.parameter, refused.value.value) == ("pipeline_parallel_size", 4)


@pytest.mark.parametrize("num_layers", [1, 2, 7, 36])
def test_layers_of_stages_are_adjacent_and_about_equal(num_layers: int) -> None:
    for count in range(1, num_layers + 1):
        ranges = [Stage(index, count).layers(num_layers) for index in range(count)]
        assert [layer for own in ranges for layer in own] == list(range(num_layers))
        sizes = [len(own) for own in ranges]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


# Parts of a step


def _scheduled(*num_tokens: int) -> list[ScheduledRequest]:
    return [
        ScheduledRequest(
            request_id=str(index), num_computed_tokens=0, num_tokens=count, block_table_start=0, block_ids=[]
        )
        for index, count in enumerate(num_tokens)
    ]


@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        ([], []),
        ([1], [1]),
        ([300], [1]),
        ([1, 1], [1, 1]),
        ([1, 1, 1, 1, 1], [2, 3]),
        ([100, 1, 1], [1, 2]),
        ([1, 1, 100], [2, 1]),
    ],
)
def test_parts_of_a_step(num_tokens: list[int], sizes: list[int]) -> None:
    scheduled = _scheduled(*num_tokens)
    parts = parts_of(scheduled, 2)
    assert [item for part in parts for item in part] == scheduled
    assert [len(part) for part in parts] == sizes


class LastStage:
    """A link that notes what passes, and reports a token of each request of each part."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.outcomes: list[list[RequestOutcome]] = []

    def pass_on(self, branch: torch.Tensor | None, residual: torch.Tensor) -> None:
        self.events.append(f"{len(residual)} rows")

    def next_report(self) -> bytes:
        self.events.append("report")
        return msgspec.msgpack.encode(self.outcomes.pop(0))

    def has_report(self, wait_s: float) -> bool:
        return False


@pytest.fixture
def first_stage(checkpoints: Checkpoints) -> tuple[CpuStageRunner, LastStage]:
    """A runner of the first two layers."""
    folder, link = checkpoints("llama").folder, LastStage()
    stage = Stage(0, 2, link)  # type: ignore[arg-type]
    parallel = parallel_of("single", stage=stage)
    model, facts = load_model(worker_config(folder), load_spec(folder), INVARIANT, parallel=parallel)
    allocate(model, Scratch(64, 64, facts.activations, torch.device("cpu")))
    cache = PagedKvCache(model.kv_layers, 16, 16, facts.dtype)
    return CpuStageRunner(model, cache, GrammarCompiler(folder, 320), StepLimits(64, 4, 64, 320), rank=0), link


def _step(step_id: int, computed: int, count: int, new: int = 0, **settings: Any) -> ExecuteStep:
    """The same for each of four requests, of which `new` tokens of each are told."""
    names = [str(index) for index in range(4)]
    params = SamplingSpec(max_tokens=8, **settings)
    return ExecuteStep(
        step_id=step_id,
        new_requests=[
            NewRequest(request_id=name, token_ids=TOKENS[:new], num_prompt_tokens=new, seed=0, params=params)
            for name in names
            if new
        ],
        scheduled=[
            ScheduledRequest(
                request_id=name,
                num_computed_tokens=computed,
                num_tokens=count,
                block_table_start=0 if new else 1,
                block_ids=[index] if new else [],
            )
            for index, name in enumerate(names)
        ],
    )


def _tokens(*token_ids: int) -> list[RequestOutcome]:
    return [RequestOutcome(token_ids=[token_id]) for token_id in token_ids]


def test_a_part_waits_only_for_the_tokens_it_continues(first_stage: tuple[CpuStageRunner, LastStage]) -> None:
    """So the first stage computes a part of the next step while the last one computes a part of this step."""
    runner, link = first_stage
    link.outcomes = [_tokens(5, 6), _tokens(7, 8), _tokens(9, 10), _tokens(11, 12)]
    runner.submit(_step(0, 0, 6, new=6))
    runner.submit(_step(1, 6, 1))
    assert link.events == ["12 rows", "12 rows", "report", "2 rows", "report", "2 rows"]
    assert runner.steps_in_flight == 2
    assert [result.token_ids for result in runner.collect().sampled] == [[5], [6], [7], [8]]
    assert not runner.step_done()
    assert [result.token_ids for result in runner.collect().sampled] == [[9], [10], [11], [12]]


def test_chunks_of_prompts_wait_for_nothing(first_stage: tuple[CpuStageRunner, LastStage]) -> None:
    runner, link = first_stage
    runner.submit(_step(0, 0, 3, new=6))
    runner.submit(_step(1, 3, 2))
    assert link.events == ["6 rows", "6 rows", "4 rows", "4 rows"]


def test_a_chunk_that_may_fail_is_waited_for(first_stage: tuple[CpuStageRunner, LastStage]) -> None:
    """Log-probabilities of a prompt may be none; the request is left out of the next step by all stages."""
    runner, link = first_stage
    failed = [RequestOutcome(error_type="RequestError"), RequestOutcome()]
    link.outcomes = [failed, [RequestOutcome()] * 2, [RequestOutcome(error_type="RequestError"), RequestOutcome()]]
    runner.submit(_step(0, 0, 3, new=6, prompt_logprobs=1))
    runner.submit(_step(1, 3, 2))
    assert link.events == ["6 rows", "6 rows", "report", "2 rows", "report", "4 rows"]
    assert [result.error is not None for result in runner.collect().sampled] == [True, False, False, False]


def test_a_report_of_another_step_is_refused(first_stage: tuple[CpuStageRunner, LastStage]) -> None:
    runner, link = first_stage
    link.outcomes = [_tokens(5)]
    runner.submit(_step(0, 0, 6, new=6))
    with pytest.raises(ProtocolError, match="rank 0: step 0: expected a report of 2 requests, found 1"):
        runner.collect()


# The link between stages


def _links(num_stages: int, **settings: Any) -> list[StageLink]:
    descriptor = os.memfd_create("stages")
    stages = [ReplicaFile(descriptor, 1, num_stages, rank, **settings).stage() for rank in range(num_stages)]
    os.close(descriptor)
    return [stage.link for stage in stages if stage.link is not None]


def test_bytes_arrive_in_order() -> None:
    """Hidden states of many sizes, some larger than a ring, and reports; each stage is late at times."""
    links = _links(3)
    shapes = [(1 + 7 * number % 40, 1 + 13 * number % 90) for number in range(200)] + [(3000, 1100), (1, 1)]

    def values(number: int, rows: int, width: int) -> torch.Tensor:
        return torch.arange(rows * width, dtype=torch.float32).view(rows, width) * (number + 1)

    def run(rank: int) -> int:
        link, wrong = links[rank], 0
        for number, shape in enumerate(shapes):
            branch, residual = torch.empty(shape), torch.empty(shape)
            if rank == 0:
                residual, branch = values(number, *shape), -values(number, *shape)
            else:
                has_branch = link.take_over(branch, residual)
                wrong += has_branch != bool(number % 2)
                wrong += not torch.equal(residual, values(number, *shape))
                wrong += has_branch and not torch.equal(branch, -values(number, *shape))
            if rank < 2:
                link.pass_on(branch if number % 2 else None, residual)
            if rank == 2:
                link.report(str(number).encode() * (1 + number))
            elif number % 3 == rank:
                # reports of several steps wait at times
                for earlier in range(max(0, number - 2), number + 1):
                    if earlier >= reported[rank]:
                        reported[rank] = earlier + 1
                        wrong += link.next_report() != str(earlier).encode() * (1 + earlier)
        return wrong

    reported = [0, 0]
    assert on_all_ranks(3, run) == [0, 0, 0]


def test_a_report_is_there_or_not() -> None:
    first, last = _links(2)
    assert not first.has_report(0.01)
    last.report(b"tokens")
    assert first.has_report(0.0)
    assert first.next_report() == b"tokens"
    assert not first.has_report(0.0)


def test_hidden_states_of_another_step_are_refused() -> None:
    first, last = _links(2)
    first.pass_on(None, torch.zeros(3, 8))
    with pytest.raises(ProtocolError, match=r"rank 1: expected hidden states 0 of 4 rows and width 8 .* 0 of 3 and 8"):
        last.take_over(torch.zeros(4, 8), torch.zeros(4, 8))


def test_a_stage_that_does_not_come_is_named() -> None:
    first, last = _links(2, patience_s=0.3)
    with pytest.raises(EngineUnhealthy, match=r"rank 1: expected rank 0 to write within 0\.3 s") as missing:
        last.take_over(torch.zeros(1, 8), torch.zeros(1, 8))
    assert missing.value.rank == 0
    with pytest.raises(EngineUnhealthy, match=r"rank 0: expected rank 1 to read within 0\.3 s") as missing:
        first.pass_on(None, torch.zeros(3000, 1100))
    assert missing.value.rank == 1


def test_a_stage_joins_once() -> None:
    descriptor = os.memfd_create("stages")
    ReplicaFile(descriptor, 2, 2, 3).stage()
    with pytest.raises(StartupError, match="rank 3: expected one worker of each rank"):
        ReplicaFile(descriptor, 2, 2, 3).stage()
    os.close(descriptor)
