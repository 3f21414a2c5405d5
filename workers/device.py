"""Which device a worker computes on, and how long steps are expected to take there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.ipc.config import Device
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import StepCosts
from sempre.workers.layers.expert_linear import ExpertLinear
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.moe import Experts
from sempre.workers.loading import WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec


def resolve_device(name: Device, index: int) -> torch.device:
    """The device that a worker computes on; of several GPUs, the one with this index. Raises ConfigError."""
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise ConfigError(
            f"device: expected a GPU for 'cuda', but this PyTorch ({torch.__version__}) {built}."
            " Use device='cpu', or check the driver with nvidia-smi.",
            parameter="device",
            value=name,
        )
    if index >= count:
        raise ConfigError(
            f"device: expected a GPU for each worker, found {count} visible GPU(s) and a worker for GPU {index}."
            " Lower data_parallel_size, or make more GPUs visible (CUDA_VISIBLE_DEVICES).",
            parameter="device",
            value=name,
        )
    return torch.device("cuda", index)


def attention_parity(model: CausalLM) -> int | None:
    """Tokens of context over which attention costs a prompt token as much as all linear layers, in multiplications.

    Experts count as often as a token has them; None if no layer's attention grows with the context.
    """
    spec = model.spec
    growing = [
        kv.head_dim for kv, window in zip(spec.kv_layers, spec.windows, strict=True) if kv.num_kv_heads and not window
    ]
    if not growing:
        return None
    linear = sum(
        module.multiplications
        for _, module in model.walk()
        if isinstance(module, Experts)
        or (isinstance(module, Linear) and not isinstance(module, ExpertLinear) and module.use is not Use.LOGITS)
    )
    return max(1, linear // sum(2 * spec.num_heads * head_dim for head_dim in growing))


@dataclass(frozen=True)
class DeviceSpeed:
    """Constants, not measured at start-up; the coordinator expects them until it has timed steps."""

    step_seconds: float
    """fixed cost of a decode step of one sequence"""
    layer_seconds: float
    """fixed cost of each layer"""
    bytes_per_second: float
    """of reading weights"""
    row_share: float
    """each additional row, in steps"""
    result_seconds: float
    """between a step's result and the next step, where that depends on it"""

    def decode_seconds(self, spec: ModelSpec, weights: WeightFacts) -> float:
        """A decode step of one sequence."""
        return self.step_seconds + self.layer_seconds * spec.num_layers + weights.nbytes / self.bytes_per_second

    def costs(self, step_seconds: float, draft_seconds: float = 0.0) -> StepCosts:
        """The costs of a model's steps, and of the tokens of a draft model beside it."""
        return StepCosts(
            step=step_seconds, row=self.row_share * step_seconds, result=self.result_seconds, draft=draft_seconds
        )
