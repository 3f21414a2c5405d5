"""The sums that decide how large a GPU's KV cache is."""

from __future__ import annotations

import pytest

from sempre.ipc.errors import ConfigError
from sempre.workers.gpu.memory import (
    RUNTIME_RESERVE_BYTES,
    MemoryPlan,
    cache_sizes,
    default_max_num_seqs,
    out_of_memory,
)
from sempre.workers.state_cache import CacheSizes, StateNeeds

GIB = 1 << 30
PLAN = MemoryPlan(total=80 * GIB, free=60 * GIB, weights=16 * GIB, activations=GIB, allocated=17 * GIB, utilization=0.9)

NO_STATES = StateNeeds(0, 1000, uses_spare=True)


def blocks(
    plan: MemoryPlan, kv_cache_memory_bytes: int | None = None, max_model_len: int = 4096, *, shortens: bool = False
) -> int:
    return sizes(plan, kv_cache_memory_bytes, max_model_len, shortens=shortens).num_blocks


def sizes(
    plan: MemoryPlan,
    kv_cache_memory_bytes: int | None = None,
    max_model_len: int = 4096,
    states: StateNeeds = NO_STATES,
    *,
    shortens: bool = False,
) -> CacheSizes:
    return cache_sizes(
        plan,
        states,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        bytes_per_block=1 << 21,
        block_size=16,
        max_model_len=max_model_len,
        shortens=shortens,
    )


def test_the_share_less_what_is_taken() -> None:
    assert PLAN.others == 3 * GIB
    assert PLAN.for_cache == 72 * GIB - 17 * GIB - RUNTIME_RESERVE_BYTES
    assert blocks(PLAN) == PLAN.for_cache >> 21


def test_no_more_than_is_free() -> None:
    crowded = MemoryPlan(**(vars(PLAN) | {"free": 10 * GIB}))
    assert crowded.for_cache == 10 * GIB - RUNTIME_RESERVE_BYTES


def test_no_more_than_can_be_used() -> None:
    assert blocks(PLAN, max_model_len=16) == 1000


def test_a_given_size_decides() -> None:
    assert blocks(PLAN, kv_cache_memory_bytes=GIB) == 512


def test_a_length_that_is_left_open_takes_what_there_is() -> None:
    assert blocks(PLAN, 100 << 21, shortens=True) == 100
    with pytest.raises(ConfigError, match="not even one block fits"):
        blocks(PLAN, 1, shortens=True)


@pytest.mark.parametrize(("uses_spare", "num_slots"), [(True, 100 + 256), (False, 101)])
def test_states_of_every_request_come_first_and_then_a_share_for_snapshots(uses_spare: bool, num_slots: int) -> None:
    states = StateNeeds(10 << 20, 100, uses_spare)
    found = sizes(PLAN, 11 * GIB, states=states)
    assert found == CacheSizes((11 * GIB - num_slots * (10 << 20)) >> 21, num_slots)


def test_requests_without_room_for_their_states_are_refused_with_the_sums() -> None:
    states = StateNeeds(10 << 20, 128, uses_spare=True)
    with pytest.raises(ConfigError, match=r"max_num_seqs: 128 requests .* 10485760 bytes each = 1342177280 bytes") as e:
        sizes(PLAN, GIB, states=states)
    assert e.value.parameter == "max_num_seqs"
    most = sizes(PLAN, states=StateNeeds(1 << 20, 128, uses_spare=True))
    assert most.num_state_slots == 4 * 128


# an H100, and Qwen3's 0.6B and 8B: bytes of the weights, and of a token's keys and values
H100 = 85_000_000_000
SHAPES = {"0.6B": (1_200_000_000, 28 * 2 * 8 * 128 * 2), "8B": (16_400_000_000, 36 * 2 * 8 * 128 * 2)}
ROW = 2 * 4 * 151_936


def sequences(total: int, shape: str, given: int | None = None, max_model_len: int | None = None) -> int:
    weights, token = SHAPES[shape]
    plan = MemoryPlan(total=total, free=total, weights=weights, activations=0, allocated=0, utilization=0.92)
    return default_max_num_seqs(
        plan, kv_cache_memory_bytes=given, bytes_per_token=token, bytes_per_row=ROW, max_model_len=max_model_len
    )


def test_the_most_sequences_follow_from_memory_and_model() -> None:
    assert sequences(H100, "0.6B") == 1024
    assert sequences(H100, "8B") == 768
    assert sequences(H100 * 2, "8B") == 1024
    assert sequences(24 << 30, "8B") == sequences(8 << 30, "8B") == 128
    found = [sequences(gib << 30, "8B") for gib in range(16, 160)]
    assert found == sorted(found)
    assert len(set(found)) > 10
    # short sequences take less of the cache
    assert sequences(40 << 30, "8B") < sequences(40 << 30, "8B", max_model_len=128)


def test_the_most_sequences_leave_room_for_what_was_asked_for() -> None:
    token = SHAPES["8B"][1]
    assert sequences(H100, "8B", given=400 * 512 * token) == 384
    assert sequences(H100, "8B", given=token) == 128
    longest = 400_000
    rows = sequences(H100, "8B", max_model_len=longest) * ROW
    assert rows + longest * token + 16_400_000_000 + RUNTIME_RESERVE_BYTES <= 0.92 * H100


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (None, ("max_model_len=444416 would fit", "weights 16.00 GiB", "other processes hold 3.00 GiB")),
        (100 << 21, ("max_model_len=1600 would fit",)),
        (61 * GIB, ("61.00 GiB is needed", "60.00 GiB is left")),
        (1, ("not even one block fits",)),
    ],
)
def test_too_little_states_the_sums(given: int | None, facts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        blocks(PLAN, given, max_model_len=1_000_000 if given is None else 4096)
    for fact in facts:
        assert fact in str(caught.value)
    assert caught.value.parameter == "max_model_len"


def test_weights_that_do_not_fit_state_the_sums() -> None:
    error = out_of_memory(
        "the weights", weights=130 * GIB, allocated=70 * GIB, free=GIB, total=80 * GIB, max_num_batched_tokens=8192
    )
    for fact in ("has 80.00 GiB", "holds 70.00 GiB", "processes 9.00 GiB", "1.00 GiB is free", "need 130.00 GiB"):
        assert fact in str(error)
