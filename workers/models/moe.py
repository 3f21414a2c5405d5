"""What families with a mixture of experts have in common: their sizes, and which layers have them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sempre.kernels.moe import ExpertShape
from sempre.workers.config_fields import ConfigFields
from sempre.workers.models.config import ModelSpec, width

MAX_EXPERTS = 4096


@dataclass(frozen=True)
class MoeSpec(ModelSpec):
    """`intermediate_size` is that of the layers without experts."""

    num_experts: int
    experts_per_token: int
    expert_size: int
    """intermediate size of an expert"""
    renormalize: bool
    """whether the weights of a row's experts add up to one"""
    sparse_layers: tuple[int, ...]
    """layers with experts"""

    @property
    def expert_shape(self) -> ExpertShape:
        return ExpertShape(self.num_experts, self.experts_per_token, self.hidden_size, self.expert_size)

    def kind_of(self, layer: int) -> Hashable:
        return super().kind_of(layer), layer in self.sparse_layers

    def with_layers(self, layers: Sequence[int]) -> Self:
        sparse = tuple(index for index, layer in enumerate(layers) if layer in self.sparse_layers)
        return replace(super().with_layers(layers), sparse_layers=sparse)


def parse_experts(config: ConfigFields, count_name: str, size_name: str) -> dict[str, Any]:
    """The first three fields of a MoeSpec; the names are those of the number of experts, and of an expert's size.

    Raises ModelError naming the field.
    """
    num_experts = config.positive(count_name, most=MAX_EXPERTS)
    experts_per_token = config.positive("num_experts_per_tok")
    if experts_per_token > num_experts:
        config.fail("num_experts_per_tok", f"at most {count_name}={num_experts}", experts_per_token)
    return {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "expert_size": width(size_name, config),
    }


def layers_by_step(config: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """Layers with experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`. Raises ModelError."""
    step = config.positive("decoder_sparse_step", default=1)
    dense = config.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        config.fail("mlp_only_layers", "a list of layers", dense)
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def refuse_windows(config: ConfigFields) -> None:
    """Raise ModelError where some layers shall have a sliding window."""
    if config.boolean("use_sliding_window", default=False):
        config.fail("use_sliding_window", "false for this architecture", True)
