"""The harness finds a difference when there is one, and says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sempre.engine.harness import (
    COORDINATOR,
    Cluster,
    Generation,
    PositionLogprobs,
    compare_generations,
    compare_settings,
    make_request,
)

ROW = PositionLogprobs((5, 6), (0xBF800000, 0xC0000000), 1)
RUN = Generation("a", token_ids=[5, 7], logprobs=[ROW, ROW], prompt_logprobs=[ROW], finish_reason="length")


def test_equal_runs() -> None:
    assert compare_generations([RUN], [replace(RUN)]).equal
    assert compare_generations([RUN], [replace(RUN)]).first_difference is None


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(RUN, token_ids=[5, 8]), "output position 1: token 7 against 8"),
        (
            replace(RUN, logprobs=[ROW, ROW._replace(bits=(0xBF800000, 0xC0000001))]),
            "output position 1: logprob of token 6: -2.0 (0xc0000000) against -2.000000238418579 (0xc0000001)",
        ),
        (
            replace(RUN, logprobs=[ROW._replace(rank=2), ROW]),
            "output position 0: log-probabilities of tokens (5, 6), rank 1, against (5, 6), 2",
        ),
        (replace(RUN, token_ids=[5]), "output of 2 tokens against 1"),
        (
            replace(RUN, prompt_logprobs=[]),
            "positions with log-probabilities (output, prompt): (2, 1) against (2, 0)",
        ),
        (
            replace(RUN, prompt_logprobs=[ROW._replace(bits=(0, 0))]),
            "prompt position 0: logprob of token 5: -1.0 (0xbf800000) against 0.0 (0x00000000)",
        ),
        (
            replace(RUN, candidate_bits=[0xBF800000]),
            "log-probability 0 of the prompt's candidates: none against -1.0 (0xbf800000)",
        ),
        (replace(RUN, finish_reason="stop"), "end ('length', None) against ('stop', None)"),
    ],
)
def test_the_first_difference_is_named(other: Generation, difference: str) -> None:
    comparison = compare_generations([RUN, RUN], [RUN, other])
    assert not comparison.equal
    assert comparison.first_difference == f"request 1 ('a'), {difference}"


def test_settings_are_compared_by_running_them() -> None:
    requests = [make_request([1, 2, 3], ordinal=i, seed=i, max_tokens=5, logprobs=0) for i in range(3)]
    plain = {"model": "tiny", "worker_module": "light_worker"}
    assert compare_settings(plain, {**plain, "data_parallel_size": 2, "max_num_batched_tokens": 2}, requests).equal


def test_targets_of_signals_are_checked(start: Callable[..., Cluster]) -> None:
    cluster = start()
    for target in (1, -1, "worker"):
        with pytest.raises(ValueError, match="expected a rank below 1 or 'coordinator'"):
            cluster.kill(target)
    cluster.stop(COORDINATOR)
    cluster.resume(COORDINATOR)
    assert cluster.call("ping") == ["pong"]
