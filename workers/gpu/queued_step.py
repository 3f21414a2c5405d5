"""Steps that a GPU computes while the host plans and queues the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sempre.workers.runner import ComputedStep, ModelRunner, StepInFlight


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


@dataclass
class QueuedStep(StepInFlight):
    """A step whose results are not on the host yet."""

    done: torch.cuda.Event = field(default_factory=_event)
    """recorded after the copies to the host"""


class QueuedRunner(ModelRunner):
    """A runner whose steps in flight are all QueuedStep."""

    def collect(self) -> ComputedStep:
        """Raises EngineUnhealthy where another rank of the replica does not come."""
        computed = super().collect()
        if (devices := self._model.parallel.devices) is not None:
            devices.check()
        return computed

    def step_done(self) -> bool:
        flight = self._in_flight[0]
        assert isinstance(flight, QueuedStep)
        return bool(flight.done.query())  # type: ignore[no-untyped-call]
