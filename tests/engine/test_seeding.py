"""Seeds: what is accepted, what is derived, what counts as equal."""

from __future__ import annotations

import hashlib
from decimal import Decimal

import msgspec
import numpy as np
import pytest

from sempre.engine.seeding import child_seed, compare_digests, derive_request_seed, validate_seed
from sempre.ipc.errors import ConfigError, SeedMismatch
from sempre.ipc.messages import RngDigests


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, np.int64(5), np.uint64(2**64 - 1)])
def test_integers_in_range_are_accepted(seed: int) -> None:
    accepted = validate_seed(seed)
    assert accepted == seed
    assert type(accepted) is int


@pytest.mark.parametrize(
    ("seed", "text"),
    [
        (None, "cannot be un-specified.*all workers .* must sample alike"),
        (True, "must be an int, got the bool True"),
        (np.True_, "must be an int"),
        (1.0, "must be an int, got 1.0 of type float"),
        ("7", "must be an int, got '7' of type str"),
        (Decimal(3), "must be an int"),
        ([1], "must be an int"),
        (-1, r"in \[0, 2\*\*64\), got -1"),
        (2**64, r"in \[0, 2\*\*64\), got 18446744073709551616"),
        (np.int64(-3), r"in \[0, 2\*\*64\), got -3"),
    ],
)
def test_everything_else_is_refused_with_a_reason(seed: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as refusal:
        validate_seed(seed)
    assert refusal.value.parameter == "seed"
    assert isinstance(refusal.value, ValueError)


def test_request_seeds_are_a_documented_function_of_engine_seed_and_ordinal() -> None:
    data = b"sempre request seed\0" + (3).to_bytes(8, "little") + (5).to_bytes(8, "little")
    assert derive_request_seed(3, 5) == int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    # fixed for ever: replaying an old request depends on it
    assert derive_request_seed(0, 0) == 11763441531849653016
    assert derive_request_seed(2**64 - 1, 2**64 - 1) == 9300089521852082638


def test_request_seeds_differ_between_engines_and_ordinals() -> None:
    seeds = {derive_request_seed(engine, ordinal) for engine in range(50) for ordinal in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeds_of_siblings_count_up_and_wrap_around() -> None:
    assert [child_seed(7, index) for index in range(3)] == [7, 8, 9]
    assert child_seed(2**64 - 1, 2) == 1


def test_equal_digests_pass_and_a_difference_names_rank_and_generator() -> None:
    same = RngDigests(python_random="p", numpy_random="n", torch_cpu="t")
    other = msgspec.structs.replace(same, numpy_random="x")
    compare_digests([same], "now")
    compare_digests([same, same, same], "now")
    with pytest.raises(SeedMismatch, match="rank 2 is seeded differently from rank 0 after warm-up") as mismatch:
        compare_digests([same, same, other], "after warm-up")
    assert mismatch.value.rank == 2
    assert mismatch.value.expected == "numpy_random=n"
    assert mismatch.value.found == "numpy_random=x"
