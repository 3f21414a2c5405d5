"""The GPU's backend where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from no_gpu import NoEvent, without_gpu

from sempre.ipc.messages import WorkerConfig
from sempre.workers.loading import Placement

CPU = torch.device("cpu")


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU's backend, on a CPU that claims not to be one."""
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the compiled kernels")
    from sempre.workers.gpu import backend, staging

    without_gpu(monkeypatch, staging)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    for name, value in {
        "empty_cache": None,
        "get_device_capability": (9, 0),
        "get_device_name": "none",
        "mem_get_info": (8 << 30, 16 << 30),
        "memory_reserved": 0,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: NoEvent())
    for name in ("_cuda_getDriverVersion", "_cuda_clearCublasWorkspaces"):
        monkeypatch.setattr(torch._C, name, lambda: 0, raising=False)

    class Interpreted(backend.GpuBackend):
        @property
        def placement(self) -> Placement:
            return Placement(CPU, lambda tensor: tensor, hashing_threads=1)

        def begin(self, config: WorkerConfig) -> None:
            pass

        @contextmanager
        def loading(self, setup: object) -> Iterator[Any]:
            yield SimpleNamespace(finish=dict)

    # the interpreter adds like numpy, whose order depends on the number of rows
    monkeypatch.setattr(backend, "require_equal", _require_close)
    return Interpreted(CPU, None)


def _require_close(comparisons: list[Any]) -> dict[str, int]:
    assert {comparison.operation.split()[0] for comparison in comparisons} >= {"linear", "model", "sampling"}
    return {}
