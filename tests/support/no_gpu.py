"""Stand-ins for the CUDA calls of the GPU's modules where there is no GPU: everything is done at once."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class NoEvent:
    """Everything is done at once."""

    def query(self) -> bool:
        return True

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Unpinned:
    """`torch` for a module that pins memory and waits for streams."""

    cuda = SimpleNamespace(Event=NoEvent, current_stream=lambda _: NoEvent(), synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, **options)


def without_gpu(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let these modules run here."""
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    for module in modules:
        monkeypatch.setattr(module, "torch", Unpinned())
