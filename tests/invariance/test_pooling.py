"""What is pooled depends on the prompt alone: batch, chunks, order, cache, replicas, crash.

With the library's ordinary matmul the same comparison must find a difference.
"""

from __future__ import annotations

import asyncio
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pooling_checkpoints import FLAGS, classifier, embedder, reranker

from sempre.engine import LLM, AsyncLLM, PoolingParams

KINDS = [*FLAGS, "classify", "rank"]
# some share prefixes of whole blocks; the lengths are even and odd, one token, and more than one key tile
SHARED = [7 + 31 * i % 3000 for i in range(64)]
PROMPTS = [
    [3 + 17 * (i + 5 * n) % 4000 for i in range(n)] if n % 2 else [*SHARED, *(5 + i for i in range(n))]
    for n in (1, 7, 20, 33, 2, 150, 63, 4, 90, 15, 131, 16)
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pooling")
    made = {kind: embedder(root / kind, kind) for kind in FLAGS}
    return made | {"classify": classifier(root / "classify"), "rank": reranker(root / "rank")}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def settings(**changes: Any) -> dict[str, Any]:
    return {"multiprocessing": False, "num_threads": 1, "device": "cpu", "kv_cache_memory_bytes": 1 << 24, **changes}


def run(model: Path, prompts: list[list[int]], **changes: Any) -> list[list[float]]:
    with LLM(model, **settings(**changes)) as llm:
        return [output.outputs.data for output in llm.encode(prompts, use_tqdm=False)]


@cache
def alone(model: Path, numerics: str = "invariant") -> list[list[float]]:
    """Each prompt in a step of its own, nothing cached."""
    with LLM(model, **settings(numerics=numerics, enable_prefix_caching=False)) as llm:
        return [llm.encode(prompt, use_tqdm=False)[0].outputs.data for prompt in PROMPTS]


def test_batch(model: Path) -> None:
    assert run(model, PROMPTS) == alone(model)


@pytest.mark.parametrize("kind", KINDS)
def test_control(kind: str, folders: dict[str, Path]) -> None:
    """The ordinary matmul gives other bits in a batch: the tests here can fail."""
    assert run(folders[kind], PROMPTS, numerics="control") != alone(folders[kind], "control")


@pytest.mark.parametrize("max_num_batched_tokens", [33, 16, 64])
def test_chunks(model: Path, max_num_batched_tokens: int) -> None:
    changes = {"max_num_seqs": 5, "max_num_batched_tokens": max_num_batched_tokens}
    assert run(model, PROMPTS, **changes) == alone(model)


def test_order(model: Path) -> None:
    assert run(model, PROMPTS[::-1], max_num_seqs=3)[::-1] == alone(model)


def test_prefix_cache(model: Path) -> None:
    """Cold, and warm where only the last token counts; the mean reads every token again."""
    with LLM(model, **settings()) as llm:
        rounds = [llm.encode(PROMPTS, use_tqdm=False) for _ in range(3)]
    for outputs in rounds:
        assert [output.outputs.data for output in outputs] == alone(model)
    cached = sum(output.num_cached_tokens for output in rounds[1])
    assert (cached > 0) == (model.name not in ("MEAN", "CLS"))


@pytest.mark.parametrize("kind", ["MEAN", "LAST", "classify"])
def test_processes_and_replicas(kind: str, folders: dict[str, Path]) -> None:
    for replicas in (1, 2):
        changes = {"multiprocessing": True, "data_parallel_size": replicas, "max_num_batched_tokens": 64}
        assert run(folders[kind], PROMPTS, **changes) == alone(folders[kind])


def test_crash(folders: dict[str, Path]) -> None:
    """The worker dies in the middle: its successor pools the unfinished prompts from their first token."""
    model = folders["MEAN"]

    async def pooled() -> list[list[float]]:
        async with AsyncLLM(model, **settings(multiprocessing=True, max_num_batched_tokens=16)) as engine:
            stream = engine.pool(PROMPTS)
            first = await stream.next()
            os.kill(engine.ready.worker_pids[0], signal.SIGKILL)
            whole = {output.request_id: output for output in [*first, *await _rest(stream)]}
            return [whole[request.request_id].pooled or [] for request in stream.requests]

    assert asyncio.run(pooled()) == alone(model)


async def _rest(stream: Any) -> list[Any]:
    outputs = []
    while news := await stream.next():
        outputs += news
    return outputs


def test_dimensions_and_norm_change_nothing_else(folders: dict[str, Path]) -> None:
    with LLM(folders["LAST"], hf_overrides={"is_matryoshka": True}, **settings()) as llm:
        raw = llm.embed(PROMPTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        cut = llm.embed(PROMPTS, pooling_params=PoolingParams(dimensions=32, use_activation=False), use_tqdm=False)
        whole = llm.embed(PROMPTS, use_tqdm=False)
    assert [output.outputs.embedding[:32] for output in raw] == [output.outputs.embedding for output in cut]
    assert [output.outputs.embedding for output in whole] == alone(folders["LAST"])
