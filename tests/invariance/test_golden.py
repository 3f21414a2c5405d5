"""Axis A16 on CPUs: the bits of the embedded model, recorded once, on every machine where they were found the same.

All other tests of this folder compare the engine with itself; this one notices what changes every run alike. Who
changes bits on purpose raises the number of CPU_PROFILE, which the fingerprint names, and records what is found here.
"""

from __future__ import annotations

import golden_digests
import pytest
from workload import make_requests, run_alone

from sempre.workers.fingerprint import CPU_PROFILE, cpu_architecture

# recorded on the first; the others were found to give the same
RECORDED_ON = ("x86_64-avx512f", "x86_64-avx2")

# of the requests without a grammar, whose masks are another library's
RECORDED = {
    "cpu-fma-1": (
        "032d995be77cf94b",
        "7a86be0b7b9fa60b",
        "ee53b535a762279a",
        "2b1361cbfc4cf239",
        "9dcd79b95d9cdb7f",
        "002bb58ae616d54b",
        "1d5ab795f47618a6",
        "8d7cc759d9917a2e",
        "d803c84e3d989b4e",
        "197223bfc196b4c7",
        "668c0fb918cbc11a",
        "2f83f5c355da51f2",
    ),
}


# the fingerprint names the architecture; that another one gives the same is expected, but not promised
@pytest.mark.skipif(
    cpu_architecture() not in RECORDED_ON, reason=f"recorded on {RECORDED_ON}, not {cpu_architecture()}"
)
@pytest.mark.parametrize("numerics", ["invariant", "control"])
def test_the_recorded_digests(numerics: str) -> None:
    runs = zip(make_requests(), run_alone(numerics), strict=True)
    found = [golden_digests.digest(run)[:16] for request, run in runs if not request.params.depends_on_output]
    differing = [i for i, (one, other) in enumerate(zip(found, RECORDED[CPU_PROFILE], strict=True)) if one != other]
    if numerics == "invariant":
        assert not differing, f"the bits of requests {differing} are not those recorded; found {found}"
    else:
        assert differing, "the control: the ordinary product gives other digests"
