"""A capture that fails: one line in the log, a part of the fingerprint, and the same bits without graphs."""

from __future__ import annotations

import logging

import pytest
import torch
from gpu_workload import launch_inproc, make_requests, run_alone

from sempre.engine.harness import compare_generations, generate
from sempre.workers.gpu.decode_graphs import DecodeGraphs, DecodeShape
from sempre.workers.gpu.runner import GpuModelRunner

pytestmark = pytest.mark.gpu


def test_an_engine_goes_on_without_graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    launch = GpuModelRunner.launch_decode

    def launch_and_wait(runner: GpuModelRunner, shape: DecodeShape) -> None:
        launch(runner, shape)
        # allowed at any time but during a capture
        torch.cuda.current_stream().synchronize()

    monkeypatch.setattr(GpuModelRunner, "launch_decode", launch_and_wait)
    with caplog.at_level(logging.WARNING):
        client = launch_inproc(enable_prefix_caching=False)
        try:
            fingerprint = client.ready.fingerprint
            run = generate(client, make_requests())
        finally:
            client.close()
    assert fingerprint["graphs"] == "failed"
    assert [record.message for record in caplog.records if "CUDA graphs are off" in record.message][1:] == []
    assert any("CUDA graphs are off: the capture of" in record.message for record in caplog.records)
    comparison = compare_generations(run_alone(), run)
    assert comparison.equal, comparison.first_difference
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_later_captures_are_not_tried() -> None:
    from sempre.kernels.sampling.gpu import Stages

    calls = []

    def launch(shape: DecodeShape) -> None:
        calls.append(shape)
        torch.cuda.current_stream().synchronize()

    graphs = DecodeGraphs(launch, enabled=True)
    shape = DecodeShape(1, 64, Stages(edits=False, truncates=False, num_best=-1))
    graphs.run(shape)
    assert (len(calls), graphs.state, len(graphs)) == (2, "failed", 0)
    graphs.run(shape)
    graphs.run(shape._replace(num_rows=2))
    assert len(calls) == 4
    # the device still works
    assert float(torch.ones(8, device="cuda").sum()) == 8.0
