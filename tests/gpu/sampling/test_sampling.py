"""The GPU's sampler against the CPU kernels, bit for bit: noise, tokens, log-probabilities, errors; CUDA graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sampling_cases import (
    EXTREME,
    PARAMETERS,
    WITH_GRAMMAR,
    disagreements,
    make_logits,
    make_states,
    run,
    verification_disagreements,
)

from sempre.kernels.sampling.noise import gumbel_noise
from sempre.workers.sampling import RowResult, Sampler, SamplingState

pytestmark = pytest.mark.gpu

VOCABULARY = 151_936


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    return torch.device("cuda")


def _sampler(device: torch.device, vocab_size: int, states: list[SamplingState], **options: Any) -> Any:
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    sampler = GpuSampler(
        device=device, vocab_size=vocab_size, max_num_seqs=len(states), num_slots=len(states), **options
    )
    for slot, state in enumerate(states):
        sampler.admit(slot, state)
    return sampler


@pytest.mark.parametrize("vocab_size", [VOCABULARY, 50_257, 1_000])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "wide"])
def test_equals_the_cpu(device: torch.device, kind: str, vocab_size: int) -> None:
    assert disagreements(device, kind, vocab_size, steps=2, seed=vocab_size) == []


@pytest.mark.parametrize("vocab_size", [130, 32_000])
def test_the_ends_of_float32(device: torch.device, vocab_size: int) -> None:
    assert disagreements(device, "huge", vocab_size, steps=2, seed=vocab_size, parameters=EXTREME) == []


@pytest.mark.parametrize("vocab_size", [200, 50_000])
def test_verification_equals_decoding_one_by_one_on_the_cpu(device: torch.device, vocab_size: int) -> None:
    for seed in range(4):
        assert verification_disagreements(device, vocab_size, seed=seed) == []


def test_a_grammar_masks_as_on_the_cpu(device: torch.device) -> None:
    assert disagreements(device, "flat", 4096, steps=3, seed=1, parameters=[*WITH_GRAMMAR, *PARAMETERS]) == []


def test_tiles_do_not_affect_the_result(device: torch.device) -> None:
    from sempre.kernels.sampling.gpu import Tiles

    small = Tiles(noise=512, logprobs=1024, edits=512, phrases=16, cut=1024, cut_piece=2048, cut_sample=4, cut_list=128)
    assert disagreements(device, "tied", 5_000, steps=2, seed=1, tiles=small) == []
    assert disagreements(device, "flat", 5_000, steps=2, seed=2, tiles=small) == []


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**64 - 1, 2**32 - 1), (0x0123456789ABCDEF, 4096)])
def test_noise(device: torch.device, seed: int, position: int) -> None:
    """Every id's noise: a row in which one id of each tile is allowed has the noise of that id as the tile's best."""
    from sempre.kernels.sampling.gpu import TILES

    rows, size = 256, TILES.noise
    states = [SamplingState(make_states([{}], 0)[0].params, seed, [1], 1) for _ in range(rows)]
    sampler = _sampler(device, VOCABULARY, states)
    stages = sampler.prepare(range(rows))
    positions = torch.full((rows,), position, dtype=torch.int64, device=device)
    num_tiles = -(-VOCABULARY // size)
    found = np.full((num_tiles, size), np.nan, np.float32)
    for first in range(0, size, rows):
        logits = torch.full((rows, num_tiles * size), float("-inf"), device=device)
        for row in range(rows):
            logits[row, first + row :: size] = 0.0
        sampler.sample(logits[:, :VOCABULARY].contiguous(), positions, stages)
        values = sampler._buffers.tile_values.view(rows, num_tiles)
        found[:, first : first + rows] = values.T.cpu().numpy()
    expected = np.empty(num_tiles * size, np.float32)
    gumbel_noise(np.uint64(seed), position, expected)
    found = found.reshape(-1)
    assert np.array_equal(found[:VOCABULARY].view(np.int32), expected[:VOCABULARY].view(np.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit(device: torch.device, dtype: torch.dtype) -> None:
    states = make_states(PARAMETERS, 3)
    logits = make_logits("flat", len(states), 3_000, 3).to(dtype)
    expected = Sampler().sample(logits.float(), states, [len(state.token_ids) for state in states])
    assert run(_sampler(device, 3_000, states), device, logits, states) == expected


def _damaged(vocab_size: int) -> tuple[torch.Tensor, list[SamplingState]]:
    parameters: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 3, "logprobs": 2},
        {"top_p": 0.5},
        {"allowed_token_ids": [1, 2]},
        {"allowed_token_ids": [5], "bad_words_token_ids": [[5]], "logprobs": 0},
        {"min_p": 0.1},
        {},
        {"temperature": 1e-30},
        {"top_p": 0.9, "repetition_penalty": 1.1},
    ]
    logits = make_logits("flat", len(parameters), vocab_size, 9)
    logits[0, 17], logits[1, 3], logits[2, 700], logits[3, 0] = torch.nan, torch.inf, torch.nan, torch.inf
    logits[4, 900] = torch.nan  # hidden by the mask
    logits[6], logits[7] = -torch.inf, -torch.inf
    logits[8, 11] = 3e38  # leaves float32 when divided, which is no error
    return logits, make_states(parameters, 4)


def test_an_error_stays_in_its_row(device: torch.device) -> None:
    logits, states = _damaged(1_000)
    expected = Sampler().sample(logits.clone(), states, [len(state.token_ids) for state in states])
    assert [result.error is None for result in expected] == [False] * 8 + [True] * 2
    sampler = _sampler(device, 1_000, states)
    assert run(sampler, device, logits, states) == expected
    healthy = make_logits("flat", len(states), 1_000, 10)
    repaired = Sampler().sample(healthy.clone(), states, [len(state.token_ids) for state in states])
    assert run(sampler, device, healthy, states)[:5] == repaired[:5]


def test_a_row_is_the_same_alone_and_without_other_stages(device: torch.device) -> None:
    states = make_states(PARAMETERS, 6)
    logits = make_logits("flat", len(states), VOCABULARY, 6)
    together = run(_sampler(device, VOCABULARY, states), device, logits, states)
    alone = [
        run(_sampler(device, VOCABULARY, [state]), device, logits[row : row + 1].clone(), [state])[0]
        for row, state in enumerate(states)
    ]
    assert together == alone


def test_graph_replays_serve_any_batch(device: torch.device) -> None:
    """One captured sequence of all stages, with other requests, positions and padding at each replay."""
    from sempre.kernels.sampling.gpu import Stages

    rows, vocab_size = 32, 5_000
    states = make_states(PARAMETERS, 7)
    sampler = _sampler(device, vocab_size, states + make_states([{}] * (rows - len(states)), 8))
    logits = torch.zeros(rows, vocab_size, device=device)
    positions = torch.zeros(rows, dtype=torch.int32, device=device)
    stages = Stages(edits=True, truncates=True, num_best=20)
    sampler.prepare([-1] * rows)
    sampler.sample(logits, positions, stages)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(logits, positions, stages)
    for step in range(3):
        order = np.random.default_rng(step).permutation(len(states)).tolist()[: 20 + step]
        batch: list[SamplingState | None] = [states[slot] for slot in order]
        raw = make_logits("flat", rows, vocab_size, 40 + step)
        places = [len(states[slot].token_ids) for slot in order]
        sampler.prepare([*order, *[-1] * (rows - len(order))])
        logits.copy_(raw)
        positions[: len(order)] = torch.tensor(places, dtype=torch.int32, device=device)
        graph.replay()
        pending = sampler.start_copy(logits, stages, [*batch, *[None] * (rows - len(batch))])
        results = sampler.collect(pending)
        expected = Sampler().sample(raw[: len(order)].clone(), [states[slot] for slot in order], places)
        assert results[: len(order)] == expected
        assert results[len(order) :] == [RowResult(None, None, None)] * (rows - len(order))
        for slot, result in zip(order, expected, strict=True):
            assert result.token_id is not None
            states[slot].token_ids.append(result.token_id)


def test_prompt_logprobs(device: torch.device) -> None:
    states = make_states([{}] * 7, 11)
    logits = make_logits("flat", 7, 3_000, 11)
    targets = [0, 2_999, 5, 5, 64, 1_000, 77]
    sampler = _sampler(device, 3_000, states)
    for num_best in (0, 4, 20, 30, -1):
        expected = Sampler().prompt_logprobs(logits.clone(), targets, num_best)
        assert sampler.prompt_logprobs(logits.to(device), targets, num_best) == expected


def test_a_resumed_request_equals_one_that_was_not_interrupted(device: torch.device) -> None:
    parameters = [{"repetition_penalty": 1.2, "presence_penalty": 0.4, "bad_words_token_ids": [[3, 7], [7, 3, 3]]}]
    steps = [make_logits("flat", 1, 40, 100 + step) for step in range(6)]
    through, resumed = make_states(parameters, 12), make_states(parameters, 12)
    sampler = _sampler(device, 40, through)
    other = _sampler(device, 40, resumed)
    for step, logits in enumerate(steps):
        if step == 3:
            other = _sampler(device, 40, resumed)
        for one, states in ((sampler, through), (other, resumed)):
            (result,) = run(one, device, logits, states)
            assert result.token_id is not None
            states[0].token_ids.append(result.token_id)
    assert through[0].token_ids == resumed[0].token_ids
