"""The three global generators of a worker are seeded as a user would seed them by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sempre.workers.seeding import numpy_seed, rng_digests, seed_everything


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_small_seeds_are_those_of_the_libraries(seed: int) -> None:
    seed_everything(seed)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_large_seeds_reach_numpy_as_two_words(seed: int) -> None:
    seed_everything(seed)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32])
    torch.manual_seed(seed)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_seeds_that_share_their_low_word_differ() -> None:
    assert numpy_seed(5) == 5
    assert numpy_seed(2**32 + 5) == [5, 1]
    seed_everything(5)
    low = rng_digests()
    seed_everything(2**32 + 5)
    high = rng_digests()
    assert low.numpy_random != high.numpy_random
    assert low.python_random != high.python_random
    assert low.torch_cpu != high.torch_cpu


def test_digests_are_of_the_states() -> None:
    seed_everything(3)
    first = rng_digests()
    assert rng_digests() == first, "reading them draws nothing"
    assert {len(digest) for digest in (first.python_random, first.numpy_random, first.torch_cpu)} == {64}
    assert first.torch_accelerator == ""

    random.random()
    assert rng_digests().python_random != first.python_random
    np.random.rand()
    assert rng_digests().numpy_random != first.numpy_random
    torch.rand(1)
    assert rng_digests().torch_cpu != first.torch_cpu

    seed_everything(3)
    assert rng_digests() == first


def test_a_cached_gaussian_is_part_of_the_digest() -> None:
    """Two normals are drawn at once: the second one waits in the state."""
    seed_everything(3)
    np.random.randn()
    waiting = rng_digests().numpy_random
    name, keys, position, has_gauss, value = np.random.get_state(legacy=True)
    np.random.set_state((name, keys, position, has_gauss, value + 1.0))
    assert rng_digests().numpy_random != waiting
    np.random.randn()
    assert rng_digests().numpy_random != waiting
    random.seed(3)
    random.gauss()
    waiting = rng_digests().python_random
    random.gauss()
    assert rng_digests().python_random != waiting
