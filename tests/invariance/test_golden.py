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

# of the requests without a grammar, whose masks are another library's; by the number of the profile, and its name
RECORDED = {
    ("cpu-fma-3", "single"): (
        "e95fc1748c0998b1",
        "459f26c08fd54113",
        "bb0f4943c43fe2df",
        "02b34fdb52989dd9",
        "c662bbe012186dc6",
        "19d47751f8e30bfc",
        "3f27d8658b6206f7",
        "d94e9d00c9f1750e",
        "330e4c8c5f6ae3ce",
        "ec37d0980d121b30",
        "afbc6847edf12e78",
        "c0c0f788a516ed2c",
    ),
    ("cpu-fma-3", "tree8"): (
        "ef84a376c7f542fe",
        "f1c75f2e5cca8b08",
        "20362953d5c76663",
        "c67741e73960432e",
        "08191cf73d715f51",
        "96d840a51841999b",
        "65ec32db5f5b19b5",
        "3511a362e2955b20",
        "5175c6fec2d20833",
        "e8c016fb2872e5fd",
        "aae37e712b06165d",
        "bcbdbfe3bb79282c",
    ),
}


# the fingerprint names the architecture; that another one gives the same is expected, but not promised
@pytest.mark.skipif(
    cpu_architecture() not in RECORDED_ON, reason=f"recorded on {RECORDED_ON}, not {cpu_architecture()}"
)
@pytest.mark.parametrize(
    ("numerics", "profile", "recorded"),
    [
        ("invariant", "single", "single"),
        ("invariant", "tree8", "tree8"),
        ("control", "single", "single"),
        ("invariant", "tree8", "single"),
    ],
)
def test_the_recorded_digests(numerics: str, profile: str, recorded: str) -> None:
    runs = zip(make_requests(), run_alone(numerics, profile), strict=True)
    found = [golden_digests.digest(run)[:16] for request, run in runs if not request.params.depends_on_output]
    expected = RECORDED[CPU_PROFILE, recorded]
    differing = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    if numerics == "invariant" and profile == recorded:
        assert not differing, f"the bits of requests {differing} are not those recorded; found {found}"
    else:
        assert differing, "the control: the ordinary matmul, or another order of sums, gives other digests"
