"""Every test of an axis runs twice.

With the invariant matmul the results must equal those of the requests run alone, in tokens and in every log-probability
bit; with the library's ordinary matmul (`numerics="control"`) the same test must find a difference, which shows that it
can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from workload import make_requests, run_alone

from sempre.engine.harness import Generation, compare_generations
from sempre.ipc.messages import RequestSpec


@pytest.fixture
def requests() -> list[RequestSpec]:
    return make_requests()


@pytest.fixture(params=["invariant", "control"])
def numerics(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def check(numerics: str) -> Callable[[Sequence[Generation]], None]:
    """Assert that a run of the requests equals the lone runs, or, for the control, that it does not."""

    def compare(run: Sequence[Generation]) -> None:
        comparison = compare_generations(run_alone(numerics), run)
        if numerics == "invariant":
            assert comparison.equal, comparison.first_difference
        else:
            assert not comparison.equal, "the control gave equal bits: this test could not notice a difference"

    return compare
