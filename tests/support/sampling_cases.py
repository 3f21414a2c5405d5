"""Batches of requests that use every sampling parameter, and their comparison between a device and the CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grammars
import torch

from sempre.ipc.messages import SamplingSpec
from sempre.kernels.sampling import RAW_LOGPROBS, Reports
from sempre.workers.sampling import RowResult, Sampler, SamplingState

if TYPE_CHECKING:  # imports Triton
    from sempre.workers.sampling.gpu_sampler import GpuSampler

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

# every stage alone and together; the rows of one batch
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5, "logprobs": 3},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 700, "temperature": 1.3},
    {"top_p": 0.05},
    {"top_p": 0.95, "temperature": 0.8},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 0.02, "top_p": 0.7, "top_k": 40, "temperature": 0.6},
    {"min_p": 1.0},
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 0.0},
    {"logprobs": 5, "top_p": 0.5},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7, "presence_penalty": -0.3, "logprobs": 2},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.2, "temperature": 0.0},
    {"logit_bias": {7: 3.5, 11: -100.0, 0: 0.25}, "top_k": 3},
    {"allowed_token_ids": [2, 3, 40, 63, 64, 65]},
    {"bad_words_token_ids": [[5], [40], [1, 2], [3, 4, 5]], "temperature": 0.0, "logprobs": 1},
    {"min_tokens": 2, "eos_token_ids": [0, 33], "stop_token_ids": [10**6], "top_p": 0.9},
    {"logprobs": -1, "presence_penalty": 1.5, "top_p": 0.9},
    {"logprobs": 30},
    {"logprobs": 2, "logprob_token_ids": [7, 3, 100], "repetition_penalty": 1.3},
]

# with logits that overflow float32 under these parameters
EXTREME: list[dict[str, Any]] = [
    {"temperature": 0.01},
    {"temperature": 0.01, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.01, "top_k": 3},
    {"temperature": 0.02, "min_p": 0.1},
    {"temperature": 3e38},
    {"temperature": 3e38, "top_k": 7, "top_p": 0.5},
    {"repetition_penalty": 1.2e-38, "temperature": 0.0},
    {"repetition_penalty": 1.2e-38, "frequency_penalty": 2.0, "presence_penalty": -2.0, "top_p": 0.5, "logprobs": 2},
    {"repetition_penalty": 3e38, "temperature": 0.5},
    {"repetition_penalty": 3e38, "logit_bias": {4: 100.0, 3: -100.0}, "allowed_token_ids": [3, 4, 5, 90]},
]

# over the vocabulary of the embedded model
WITH_GRAMMAR: list[dict[str, Any]] = [
    {"grammar": grammars.LETTERS, "eos_token_ids": grammars.EOS, **others}
    for others in (
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.9},
        {"top_k": 4, "logit_bias": {67: 3.0}, "repetition_penalty": 1.2, "min_tokens": 2},
    )
]


def make_states(parameters: list[dict[str, Any]], seed: int) -> list[SamplingState]:
    """One request per set of parameters, with the output so far [4, 4, 3]; none under a grammar."""
    return [_make_state(SamplingSpec(max_tokens=64, **values), seed, index) for index, values in enumerate(parameters)]


def _make_state(params: SamplingSpec, seed: int, index: int) -> SamplingState:
    tokens = [*PROMPT, 4, 4, 3]
    if not params.depends_on_output:
        return SamplingState(params, seed * 7919 + index * 2**33, tokens, len(PROMPT))
    del tokens[len(PROMPT) :]
    grammar = grammars.compiler().start(params, tokens, len(PROMPT))
    return SamplingState(params, seed * 7919 + index * 2**33, tokens, len(PROMPT), grammar)


def make_logits(kind: str, rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """float32 [rows, V]: "flat" (normal), "peaked" (a few far above), "tied" (many equal), "wide" (huge range), "huge"
    (to the ends of float32, a few of them forbidden)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab_size, generator=generator)
    if kind == "peaked":
        return x * 2 + 14 * (torch.rand(rows, vocab_size, generator=generator) < 8 / vocab_size)
    if kind == "tied":
        return (x * 2).round() / 2
    if kind == "wide":
        return x * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    if kind == "huge":
        spread = x * 10.0 ** torch.randint(0, 39, (rows, vocab_size), generator=generator)
        largest = torch.finfo(torch.float32).max
        forbidden = torch.rand(rows, vocab_size, generator=generator) < 0.1
        return spread.clamp(-largest, largest).masked_fill(forbidden, -torch.inf)
    assert kind == "flat", kind
    return x


def run(
    sampler: GpuSampler, device: torch.device, logits: torch.Tensor, states: list[SamplingState]
) -> list[RowResult]:
    """One step of every state, in rows in order, on the device."""
    stages = sampler.prepare(range(len(states)))
    on_device = logits.to(device)
    positions = torch.tensor([len(state.token_ids) for state in states], dtype=torch.int32).to(device)
    sampler.sample(on_device, positions, stages)
    return sampler.collect(sampler.start_copy(on_device, stages, list(states)))


def disagreements(
    device: torch.device,
    kind: str,
    vocab_size: int,
    *,
    steps: int,
    seed: int,
    parameters: list[dict[str, Any]] = PARAMETERS,
    reports: Reports = RAW_LOGPROBS,
    **options: Any,
) -> list[str]:
    """What differs between the device and the CPU over some steps, each continuing with the CPU's tokens."""
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    states = make_states(parameters, seed)
    sampler = GpuSampler(
        device=device,
        vocab_size=vocab_size,
        max_num_seqs=len(states),
        num_slots=len(states),
        reports=reports,
        **options,
    )
    for slot, state in enumerate(states):
        sampler.admit(slot, state)
    found = []
    for step in range(steps):
        logits = make_logits(kind, len(states), vocab_size, seed + step)
        positions = [len(state.token_ids) for state in states]
        expected = Sampler(reports).sample(logits.clone(), states, positions)
        for row, (left, right) in enumerate(zip(run(sampler, device, logits, states), expected, strict=True)):
            if left != right:
                found.append(f"{kind} V={vocab_size} step {step} {parameters[row]}: {left} instead of {right}")
        for state, result in zip(states, expected, strict=True):
            if result.token_id is None:
                raise AssertionError(f"{state.params}: {result.error}")
            state.token_ids.append(result.token_id)
    return found


def verification_disagreements(
    device: torch.device,
    vocab_size: int,
    *,
    seed: int,
    parameters: list[dict[str, Any]] = PARAMETERS,
    reports: Reports = RAW_LOGPROBS,
    **options: Any,
) -> list[str]:
    """What differs when rows verify drafts: the tokens of every row whose drafts are right so far, the last accepted
    token, and a plain step after it. The CPU decodes one by one. A third of the drafts is wrong."""
    from sempre.kernels.sampling.gpu import DraftedRows
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    states = make_states(parameters, seed)
    most = 4
    sampler = GpuSampler(
        device=device,
        vocab_size=vocab_size,
        max_num_seqs=(1 + most) * len(states) + 2,
        num_slots=len(states),
        reports=reports,
        **options,
    )
    last_tokens = torch.full((len(states),), -5)
    rows: list[tuple[int, int, int, int, RowResult | None]] = []  # slot, offset, input, position, expected
    logits = []
    for slot, state in enumerate(states):
        sampler.admit(slot, state)
        stands = True
        drafted = state.token_ids[-1]
        for offset in range(1 + slot % (1 + most)):
            logits.append(make_logits("peaked", 1, vocab_size, seed * 1000 + slot * 10 + offset))
            position = len(state.token_ids) if stands else rows[-1][3] + 1
            if not stands:
                rows.append((slot, offset, drafted, position, None))
                continue
            result = Sampler(reports).sample(logits[-1].clone(), [state], [position])[0]
            assert result.token_id is not None, result.error
            rows.append((slot, offset, drafted, position, result))
            state.token_ids.append(result.token_id)
            last_tokens[slot] = result.token_id
            stands = (slot + offset) % 3 != 2
            drafted = result.token_id if stands else (result.token_id + 1) % vocab_size
    rows += [(-1, 0, 0, 0, None)] * 2
    logits += [torch.zeros(2, vocab_size)]
    slots, offsets, inputs, positions, expected = zip(*rows, strict=True)
    on_device = torch.cat(logits).to(device)
    stages = sampler.prepare(slots)
    drafts = DraftedRows(
        torch.tensor(offsets, dtype=torch.int32).to(device),
        torch.tensor(inputs).to(device),
        torch.full((len(states),), -5).to(device),
    )
    sampler.sample(on_device, torch.tensor(positions).to(device), stages, drafts)
    row_states = [states[slot] if slot >= 0 else None for slot in slots]
    results = sampler.collect(sampler.start_copy(on_device, stages, row_states))
    found = [
        f"slot {slot} row {offset} ({parameters[slot]}): {left} instead of {right}"
        for left, right, slot, offset in zip(results, expected, slots, offsets, strict=True)
        if right is not None and left != right
    ]
    if not torch.equal(drafts.last_tokens.cpu(), last_tokens):
        found.append(f"last tokens {drafts.last_tokens.tolist()} instead of {last_tokens.tolist()}")
    after = make_logits("flat", len(states), vocab_size, seed)
    expected_after = Sampler(reports).sample(after.clone(), states, [len(state.token_ids) for state in states])
    for slot, (left, right) in enumerate(zip(run(sampler, device, after, states), expected_after, strict=True)):
        if left != right:
            found.append(f"slot {slot} ({parameters[slot]}) afterwards: {left} instead of {right}")
    return found
