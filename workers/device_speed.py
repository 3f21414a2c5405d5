"""How long steps may be expected to take on a kind of device: what decides how many tokens are worth a guess."""

from __future__ import annotations

from dataclasses import dataclass

from sempre.ipc.messages import StepCosts
from sempre.workers.models.decoder import DecoderWeights
from sempre.workers.models.spec import ModelSpec


@dataclass(frozen=True)
class DeviceSpeed:
    """Constants, not measured at start-up: the number of guesses must not vary from start to start."""

    step_seconds: float
    """of a decode step of one sequence, whatever the model"""
    layer_seconds: float
    """each layer's, whatever its size"""
    bytes_per_second: float
    """of weights"""
    row_share: float
    """one row more, in steps"""
    result_seconds: float
    """between a step's result and the next step, where that follows from it"""

    def decode_seconds(self, spec: ModelSpec, weights: DecoderWeights) -> float:
        """A decode step of one sequence."""
        return self.step_seconds + self.layer_seconds * spec.num_layers + weights.nbytes / self.bytes_per_second

    def costs(self, step_seconds: float, guess_seconds: float = 0.0) -> StepCosts:
        """Of steps of a model, and of guesses of a draft model beside it."""
        return StepCosts(
            step=step_seconds, row=self.row_share * step_seconds, result=self.result_seconds, guess=guess_seconds
        )
