"""Axis A16 on CPUs: the bits of the embedded model, recorded once, on every machine where they were found the same.

All other tests of this folder compare the engine with itself; this one notices what changes every run alike. To change
bits on purpose, raise the number of CPU_PROFILE, which the fingerprint names, and record what is found here.
"""

from __future__ import annotations

import golden_digests
import pytest
from workload import make_requests, run_alone

from sempre.workers.fingerprint import CPU_PROFILE, cpu_architecture

# recorded on the first; code generated for the second was found to give the same
RECORDED_ON = ("x86_64-avx512f", "x86_64-avx2")

# of the requests without a grammar, whose masks are another library's
RECORDED = {
    "cpu-fma-2": (
        "092802d4137f3645",
        "21cd29cd65b1316a",
        "773dc9e0b1b6a51a",
        "7cd0575a02067159",
        "5e2e0cf7dd9d99e5",
        "819720bf394330cc",
        "94b0725e4bceded9",
        "dda4a6b7595b097c",
        "4bdad3b769ba5971",
        "3bdebe6d638f3cbd",
        "a7f2f53d018436b8",
        "6439bc1101ccd5a1",
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
        assert differing, "the control: the ordinary matmul gives other digests"
