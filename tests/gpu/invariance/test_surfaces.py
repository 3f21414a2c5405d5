"""Axis A12 on a GPU: one call for all, streams at once from the asynchronous engine, and requests alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from surfaces import facts, stream_all

from sempre.engine import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [
    "It was a dark and stormy night, and the",
    "The",
    "And God said, Let there be",
    "Fellow citizens of the Senate and of the House of Representatives: " * 6,
    "To be, or not to be: that is the question",
]
PARAMS = SamplingParams(temperature=0.9, top_p=0.97, max_tokens=24, logprobs=3, seed=2024)
SETTINGS = {"model": "tiny", "device": "cuda", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}


def test_surfaces() -> None:
    with LLM(**SETTINGS, multiprocessing=False) as llm:
        alone = [facts(llm.generate([p], PARAMS, use_tqdm=False)[0].outputs[0]) for p in PROMPTS]
        together = [facts(output.outputs[0]) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        other = replace(PARAMS, seed=2025)
        reseeded = [facts(output.outputs[0]) for output in llm.generate(PROMPTS, other, use_tqdm=False)]
    assert together == alone
    assert asyncio.run(stream_all(SETTINGS, PROMPTS, PARAMS)) == alone
    assert reseeded != alone
