"""A test harness for a distributed engine: real processes, real sockets, injected faults. Public and documented.

    from sempre.engine.harness import Cluster, Fault, compare_settings, make_request

    with Cluster("tiny", data_parallel_size=2) as cluster:
        first, second = cluster.rng_digests()                  # of each rank
        assert first == second
        results = cluster.generate([make_request([1, 2, 3], max_tokens=8, seed=7)])
        cluster.kill(1)                                        # SIGKILL to the worker of rank 1
        cluster.generate(...)                                  # after a pause, the same bits

    Cluster("tiny", worker_faults=[Fault("drop", "up", message="StepResult", nth=3)])

    scenario = Scenario("a slow rank dies", (ProcessFault("slow", 1), ProcessFault("kill", 1, after_s=0.5)))
    report = run_scenario(scenario, requests, "tiny", tensor_parallel_size=2)
    assert report.problems(results_of_an_undisturbed_run) == []

    comparison = compare_settings({"model": "tiny", "numerics_profile": "tree8"}, {"model": "tiny",
                                  "tensor_parallel_size": 2}, requests)
    assert comparison.equal, comparison                        # the first token, layer and operation that differ

    cluster.py     Cluster: a coordinator and N workers, their pids, digests, steps, stacks, signals
    faults.py      Fault, FaultProxy: delayed, dropped, repeated, corrupted, reordered frames and partitions of a link
    scenarios.py   Scenario, ProcessFault, run_scenario: faults of processes and links as data, and what became of them
    processes.py   what is done to a process from outside
    generation.py  make_request, generate, Generation: requests and results in token ids and raw logprob bits
    comparison.py  compare_settings, Comparison
    hosts.py       make_hosts: network namespaces as hosts with addresses of their own, which can be cut off
    questions.py   Questions: calls of workers, metrics, ranks

Requests are made of token ids, so no tokenizer is involved. Works on Linux. The clock of the system is not among the
faults: no decision of the engine reads it.
"""

from sempre.engine.harness.cluster import COORDINATOR, Cluster
from sempre.engine.harness.comparison import Comparison, compare_generations, compare_settings
from sempre.engine.harness.faults import Fault, FaultProxy
from sempre.engine.harness.generation import Generation, Outcome, PositionLogprobs, generate, make_request, outcomes
from sempre.engine.harness.hosts import Hosts, make_hosts
from sempre.engine.harness.scenarios import ProcessFault, Scenario, ScenarioReport, run_scenario

__all__ = [
    "COORDINATOR",
    "Cluster",
    "Comparison",
    "Fault",
    "FaultProxy",
    "Generation",
    "Hosts",
    "Outcome",
    "PositionLogprobs",
    "ProcessFault",
    "Scenario",
    "ScenarioReport",
    "compare_generations",
    "compare_settings",
    "generate",
    "make_hosts",
    "make_request",
    "outcomes",
    "run_scenario",
]
