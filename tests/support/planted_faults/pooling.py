"""Faults of pooling."""

from __future__ import annotations

from planted_faults.fault import Fault

WORKER = "workers/pooling.py"
TESTS = "tests/workers/test_pooling.py"

POOLING = (
    Fault(
        "mean-over-the-last-chunk",
        "The sum over a prompt is divided by the number of tokens in its last step.",
        WORKER,
        "plan.context[done]]",
        "plan.num_tokens[done]]",
        ("tests/invariance/test_pooling.py::test_chunks",),
    ),
    Fault(
        "sum-of-the-former-prompt",
        "A prompt's sum begins with what an earlier request left in its slot.",
        WORKER,
        "begins = (plan.computed == 0).astype(np.int64)",
        "begins = np.zeros_like(plan.computed)",
        ("tests/invariance/test_pooling.py::test_prefix_cache",),
    ),
    Fault(
        "row-of-another-prompt",
        "With rows of several requests, the first one's row is pooled for all.",
        WORKER,
        "np.cumsum(plan.samples)",
        "plan.samples.astype(np.int64)",
        ("tests/invariance/test_pooling.py::test_batch",),
    ),
    Fault(
        "no-against-yes",
        "The score is the probability that the document does not answer.",
        WORKER,
        "values[1:] - values[:1]",
        "values[:1] - values[1:]",
        (f"{TESTS}::test_scores_are_the_probability_of_yes_against_no",),
    ),
    Fault(
        "norm-of-the-whole-vector",
        "A vector that is cut keeps the norm of the whole one.",
        WORKER,
        "return wanted / max(_norm(wanted), _LEAST_NORM)",
        "return wanted / max(_norm(values), _LEAST_NORM)",
        (f"{TESTS}::test_norm_and_dimensions",),
    ),
    Fault(
        "mean-without-cached-tokens",
        "A prompt whose every token counts takes its first ones from the prefix cache.",
        "engine/scheduling/request.py",
        " or limits.pools_every_token)",
        ")",
        ("tests/invariance/test_pooling.py::test_prefix_cache",),
    ),
)
