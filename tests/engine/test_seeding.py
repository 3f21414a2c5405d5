"""Seeds: what is accepted, what is derived, what counts as equal."""

from __future__ import annotations

import hashlib
from decimal import Decimal

import msgspec
import numpy as np
import pytest

from sempre.engine.seeding import (
    child_seed,
    compare_digests,
    derive_request_seed,
    distribution_digest,
    reported_seed,
    request_digest,
    validate_seed,
)
from sempre.ipc.errors import ConfigError, SeedMismatch
from sempre.ipc.messages import PromptCandidates, ReasoningSpec, RngDigests, SamplingSpec


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


def test_request_seeds_are_a_documented_function() -> None:
    digest = hashlib.sha256(b"request").digest()
    data = b"sempre request seed\0" + (3).to_bytes(8, "little") + digest + (5).to_bytes(8, "little")
    assert derive_request_seed(3, digest, 5) == int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    # fixed forever: replaying an old evaluation depends on them
    spec = SamplingSpec(max_tokens=4, temperature=0.7, top_p=0.9, logit_bias={7: 0.5}, bad_words_token_ids=[[1, 2]])
    digest = request_digest(distribution_digest(spec), [1, 2, 300])
    assert digest.hex() == "fb4030dcb5bc606b8f44601b303d9e9f43b0eb5df5ae31be9aef8904793f23b2"
    assert derive_request_seed(0, digest, 0) == 17988096119851996016
    assert derive_request_seed(2**64 - 1, digest, 2**32 - 1) == 18152980250666787756


def test_request_seeds_differ() -> None:
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(10)]
    seeds = {derive_request_seed(e, digest, n) for e in range(10) for digest in digests for n in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)


BASE = SamplingSpec(
    max_tokens=10,
    temperature=0.7,
    eos_token_ids=[1],
    logit_bias={5: 1.0, 6: -1.0},
    allowed_token_ids=[5, 6, 7],
    bad_words_token_ids=[[5], [6, 7]],
)

# every field, and whether a change of it is another request to sample from
CHANGES: dict[str, tuple[object, bool]] = {
    "max_tokens": (11, False),
    "min_tokens": (2, False),
    "temperature": (0.8, True),
    "top_p": (0.9, True),
    "top_k": (7, True),
    "min_p": (0.1, True),
    "presence_penalty": (0.5, True),
    "frequency_penalty": (0.5, True),
    "repetition_penalty": (1.5, True),
    "logit_bias": ({5: 1.0, 6: -1.5}, True),
    "allowed_token_ids": ([5, 6], True),
    "bad_words_token_ids": ([[5], [6, 8]], True),
    "eos_token_ids": ([], False),
    "stop_token_ids": ([9], False),
    "logprobs": (3, False),
    "prompt_logprobs": (3, False),
    "grammar": ("{}", True),
    "reasoning": (ReasoningSpec(start="<think>", end="</think>", end_token_ids=[3], grammar="{}"), True),
    "logprob_token_ids": ([4], False),
    "prompt_candidates": (PromptCandidates(start=0, width=1, token_ids=b"\1\0\0\0"), False),
}


def test_every_field_has_decided() -> None:
    assert set(CHANGES) == set(SamplingSpec.__struct_fields__)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_in_the_digest(name: str) -> None:
    value, counts = CHANGES[name]
    changed = msgspec.structs.replace(BASE, **{name: value})
    assert changed != BASE
    assert (distribution_digest(changed) != distribution_digest(BASE)) is counts


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {6: -1.0, 5: 1.0}},
        {"logit_bias": {5: 1.0, 6: -1.0, 9: 0.0, 10: -0.0}},
        {"allowed_token_ids": [7, 5, 6, 6]},
        {"bad_words_token_ids": [[6, 7], [5], [5]]},
        {"temperature": float(np.float32(0.7))},
        {"presence_penalty": -0.0, "frequency_penalty": 1e-60},
    ],
    ids=str,
)
def test_other_words_for_the_same(changes: dict[str, object]) -> None:
    assert distribution_digest(msgspec.structs.replace(BASE, **changes)) == distribution_digest(BASE)


def test_how_long_a_request_may_reason_is_a_length() -> None:
    budget = ReasoningSpec(start="<think>", end="</think>", end_token_ids=[3], budget=7)
    assert distribution_digest(msgspec.structs.replace(BASE, reasoning=budget)) == distribution_digest(BASE)


def test_prompts_are_told_apart() -> None:
    distribution = distribution_digest(BASE)
    prompts = [[1, 2], [2, 1], [1, 2, 0], [258], [1], []]
    assert len({request_digest(distribution, prompt) for prompt in prompts}) == len(prompts)


def test_seeds_of_siblings_count_up_and_wrap_around() -> None:
    assert [child_seed(7, index) for index in range(3)] == [7, 8, 9]
    assert child_seed(2**64 - 1, 2) == 1
    assert [child_seed(-2, index) for index in range(4)] == [2**64 - 2, 2**64 - 1, 0, 1]
    # as the user is told: never -1, which would ask for no seed
    assert [reported_seed(-3, index) for index in range(5)] == [-3, -2, 2**64 - 1, 0, 1]
    assert [reported_seed(2**64 - 1, index) for index in range(2)] == [2**64 - 1, 0]


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
