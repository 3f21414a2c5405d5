"""Warm-up: every kernel runs once before the first request, so that none is compiled or loaded while users wait."""

from __future__ import annotations

from sempre.ipc.messages import ExecuteStep, NewRequest, PoolingSpec, SamplingSpec, ScheduledRequest
from sempre.workers.runner import ModelRunner

PROMPT_TOKENS = 20

# together they reach every part of the sampler
_PARAMS = (
    SamplingSpec(max_tokens=2, temperature=0.0, logprobs=1, prompt_logprobs=1),
    SamplingSpec(
        max_tokens=2,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        logprobs=1,
    ),
)


def warm_up(runner: ModelRunner) -> None:
    """Run a prompt and a decode step for each kind of sampling, or one prompt that is pooled, then wipe what they
    wrote."""
    cache, limits = runner.cache, runner.limits
    room = min(limits.max_model_len, cache.num_blocks * cache.block_size, limits.max_num_batched_tokens)
    num_tokens = max(1, min(PROMPT_TOKENS, room - 1))
    block_ids = list(range(-(-min(num_tokens + 1, room) // runner.cache.block_size)))
    pooling = PoolingSpec() if runner.pools else None
    for index, params in enumerate(_PARAMS[:1] if runner.pools else _PARAMS):
        request_id = f"warm-up-{index}"
        new = NewRequest(
            request_id=request_id,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            seed=0,
            params=params,
            pooling=pooling,
        )
        prompt = ScheduledRequest(
            request_id=request_id,
            num_computed_tokens=0,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=block_ids,
            state_writes=[(num_tokens - 1, 0)] if limits.num_state_slots else [],
        )
        runner.execute(ExecuteStep(step_id=0, new_requests=[new], scheduled=[prompt]))
        if num_tokens < room and not runner.pools:
            decode = ScheduledRequest(
                request_id=request_id,
                num_computed_tokens=num_tokens,
                num_tokens=1,
                block_table_start=len(block_ids),
                block_ids=[],
                state_read=0 if limits.num_state_slots else -1,
                state_writes=[(0, 0)] if limits.num_state_slots else [],
            )
            runner.execute(ExecuteStep(step_id=0, scheduled=[decode]))
        runner.execute(ExecuteStep(step_id=0, finished_request_ids=[request_id]))
    cache.clear(block_ids)
    if limits.num_state_slots and cache.states is not None:
        cache.states.clear([0])
