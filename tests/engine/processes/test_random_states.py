"""Workers are seeded like a plain process; the user's own generators are left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sempre.engine.client.inproc import InprocClient
from sempre.engine.config import EngineConfig
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import Cluster
from sempre.engine.harness.scripted_worker import ScriptedWorker
from sempre.ipc.messages import RequestSpec
from sempre.workers.seeding import rng_digests

Start = Callable[..., Cluster]

PLAIN_PROCESS = """
import hashlib, json, random, sys
import numpy, torch
seed = int(sys.argv[1])
random.seed(seed)
numpy.random.seed(seed if seed < 2**32 else [seed % 2**32, seed // 2**32])
torch.manual_seed(seed)
from sempre.workers.seeding import rng_digests
digests = rng_digests()
print(json.dumps({name: getattr(digests, name) for name in digests.__struct_fields__}))
"""


def plain_digests(seed: int) -> dict[str, str]:
    program = [sys.executable, "-c", PLAIN_PROCESS, str(seed)]
    digests: dict[str, str] = json.loads(subprocess.run(program, capture_output=True, check=True).stdout)
    return digests


@pytest.fixture
def _restored_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 0), (4, 0), (1, 2**64 - 1)])
def test_every_worker_is_seeded_like_a_plain_process(start: Start, workers: int, seed: int) -> None:
    cluster = start("scripted", data_parallel_size=workers, seed=seed)
    assert cluster.rng_digests() == [plain_digests(seed)] * workers


def test_workers_with_a_model_are_seeded_so_too_and_stay_so(
    start: Start, requests: Callable[..., list[RequestSpec]]
) -> None:
    cluster = start("tiny", data_parallel_size=2, max_model_len=256, num_threads=1, seed=2**40 + 7)
    expected = [plain_digests(2**40 + 7)] * 2
    assert cluster.rng_digests() == expected
    cluster.generate(requests(4))
    assert cluster.rng_digests() == expected


def test_different_seeds_give_different_states(start: Start) -> None:
    first, second = (start("scripted", seed=seed).rng_digests()[0] for seed in (1, 2))
    assert all(first[name] != second[name] for name in ("python_random", "numpy_random", "torch_cpu"))


def test_the_user_s_generators_are_left_alone(start: Start, requests: Callable[..., list[RequestSpec]]) -> None:
    before = rng_digests()
    cluster = start("scripted", data_parallel_size=2)
    assert rng_digests() == before
    cluster.generate(requests(5))
    assert rng_digests() == before
    cluster.close()
    assert rng_digests() == before


@pytest.mark.usefixtures("_restored_generators")
def test_an_engine_in_this_process_seeds_it() -> None:
    config = EngineConfig(model="scripted", model_path=Path("/"), seed=11, multiprocessing=False)
    client = InprocClient.launch(config, executor=InprocExecutor(config, ScriptedWorker))
    digests = rng_digests()
    assert {name: getattr(digests, name) for name in digests.__struct_fields__} == plain_digests(11)
    client.close()
