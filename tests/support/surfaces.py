"""What a completion reports, as exact values, and the same prompts streamed all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sempre.engine import AsyncLLM, RequestOutputKind, SamplingParams
from sempre.engine.outputs import CompletionOutput

# the facts of one completion: token ids, and (id, logprob) of every reported alternative; exact floats
Facts = tuple[list[int], list[list[tuple[int, float]]]]


def facts(completion: CompletionOutput) -> Facts:
    rows = [[(token, entry.logprob) for token, entry in row.items()] for row in completion.logprobs or []]
    return list(completion.token_ids), rows


async def stream_all(settings: Mapping[str, Any], prompts: Sequence[str], params: SamplingParams) -> list[Facts]:
    """Stream all prompts at once, in deltas, from an asynchronous engine with `settings`."""
    params = replace(params, output_kind=RequestOutputKind.DELTA)

    async def one(engine: AsyncLLM, number: int, prompt: str) -> Facts:
        tokens: list[int] = []
        rows: list[list[tuple[int, float]]] = []
        async for output in engine.generate(prompt, params, f"request-{number}"):
            ids, logprobs = facts(output.outputs[0])
            tokens += ids
            rows += logprobs
        return tokens, rows

    async with AsyncLLM(**settings) as engine:
        return list(await asyncio.gather(*(one(engine, i, prompt) for i, prompt in enumerate(prompts))))
