"""Workers are seeded like a plain process; the user's own generators are left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from scripted_worker import ScriptedWorker

from sempre.engine.client.inproc import InprocClient
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import Cluster
from sempre.ipc.config import EngineConfig
from sempre.ipc.messages import RequestSpec
from sempre.workers.seeding import rng_digests

Start = Callable[..., Cluster]

PLAIN_PROCESS = """
import json, random, sys
import numpy, torch
from sempre.workers.seeding import rng_digests
found = []
for seed in map(int, sys.argv[1:]):
    random.seed(seed)
    numpy.random.seed(seed if seed < 2**32 else [seed % 2**32, seed // 2**32])
    torch.manual_seed(seed)
    digests = rng_digests()
    found.append({name: getattr(digests, name) for name in digests.__struct_fields__})
print(json.dumps(found))
"""
SEEDS = (0, 11, 2**40 + 7, 2**64 - 1)


@cache
def all_plain_digests() -> dict[int, dict[str, str]]:
    program = [sys.executable, "-c", PLAIN_PROCESS, *map(str, SEEDS)]
    digests = json.loads(subprocess.run(program, capture_output=True, check=True).stdout)
    return dict(zip(SEEDS, digests, strict=True))


def plain_digests(seed: int) -> dict[str, str]:
    return all_plain_digests()[seed]


@pytest.fixture
def _restored_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize(("workers", "seed"), [(2, 0), (1, 2**64 - 1), pytest.param(4, 0, marks=pytest.mark.product)])
def test_every_worker_is_seeded_like_a_plain_process(start: Start, workers: int, seed: int) -> None:
    cluster = start("scripted_worker", data_parallel_size=workers, seed=seed)
    assert cluster.rng_digests() == [plain_digests(seed)] * workers


def test_workers_with_a_model_are_seeded_alike_and_stay_so(
    start: Start, requests: Callable[..., list[RequestSpec]]
) -> None:
    cluster = start("sempre.workers", data_parallel_size=2, max_model_len=256, num_threads=1, seed=2**40 + 7)
    expected = [plain_digests(2**40 + 7)] * 2
    assert cluster.rng_digests() == expected
    cluster.generate(requests(4))
    assert cluster.rng_digests() == expected


def test_different_seeds_give_different_states() -> None:
    """In every generator of a plain process, and so, by the tests above, in those of every worker."""
    for name in ("python_random", "numpy_random", "torch_cpu"):
        assert len({plain_digests(seed)[name] for seed in SEEDS}) == len(SEEDS)


def test_the_user_s_generators_are_left_alone(start: Start, requests: Callable[..., list[RequestSpec]]) -> None:
    before = rng_digests()
    cluster = start(data_parallel_size=2)
    assert rng_digests() == before
    cluster.generate(requests(5))
    assert rng_digests() == before
    cluster.close()
    assert rng_digests() == before


@pytest.mark.usefixtures("_restored_generators")
def test_an_engine_in_this_process_seeds_it() -> None:
    config = EngineConfig(model="scripted", model_path="/", seed=11, multiprocessing=False)
    client = InprocClient.launch(config, executor=InprocExecutor(config, ScriptedWorker))
    digests = rng_digests()
    assert {name: getattr(digests, name) for name in digests.__struct_fields__} == plain_digests(11)
    client.close()
