"""A test harness for a distributed engine: real processes, real sockets, injected faults. Public and documented.

    from sempre.engine.harness import Cluster, Fault, compare_settings, make_request

    with Cluster("tiny", data_parallel_size=2) as cluster:
        first, second = cluster.rng_digests()                  # of each rank
        assert first == second
        results = cluster.generate([make_request([1, 2, 3], max_tokens=8, seed=7)])
        cluster.kill(1)                                        # SIGKILL to the worker of rank 1
        cluster.generate(...)                                  # after a pause, the same bits

    Cluster("tiny", worker_faults=[Fault("drop", "up", message="StepResult", nth=3)])

    comparison = compare_settings({"model": "tiny"}, {"model": "tiny", "max_num_batched_tokens": 32}, requests)
    assert comparison.equal, comparison.first_difference

    cluster.py     Cluster: a coordinator and N workers, their pids, digests, signals
    faults.py      Fault, FaultProxy: delayed, dropped, duplicated and corrupted frames on a link
    generation.py  make_request, generate, Generation: requests and results in token ids and raw logprob bits
    comparison.py  compare_settings, Comparison

Requests are made of token ids, so no tokenizer is involved. Works on Linux.
"""

from sempre.engine.harness.cluster import COORDINATOR, Cluster
from sempre.engine.harness.comparison import Comparison, compare_generations, compare_settings
from sempre.engine.harness.faults import Fault, FaultProxy
from sempre.engine.harness.generation import Generation, PositionLogprobs, generate, make_request

__all__ = [
    "COORDINATOR",
    "Cluster",
    "Comparison",
    "Fault",
    "FaultProxy",
    "Generation",
    "PositionLogprobs",
    "compare_generations",
    "compare_settings",
    "generate",
    "make_request",
]
