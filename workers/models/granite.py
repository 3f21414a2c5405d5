"""Granite 3: Llama's block with factors for embeddings, scores, branches and logits (IBM, Granite 3.0, 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sempre.kernels.attention import KvCache
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.module import Build
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.models.base import Branch, CausalLM, Stack
from sempre.workers.models.config import (
    BiasRule,
    FamilyRules,
    ModelSpec,
    extended,
    parse_decoder,
    refuse_other_activation,
    with_defaults,
)
from sempre.workers.models.llama import LlamaBlock, attention_shape, gated_mlp
from sempre.workers.steps import StepInput, rows_read

RULES = FamilyRules(qkv_bias=BiasRule.ATTENTION_BIAS, o_bias=BiasRule.ATTENTION_BIAS, mlp_bias=BiasRule.MLP_BIAS)
DEFAULTS: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class GraniteSpec(ModelSpec):
    embedding_multiplier: float
    attention_multiplier: float
    """in place of 1 / sqrt(head_dim)"""
    residual_multiplier: float
    """of each branch, before it is added"""
    logits_scaling: float
    """logits are divided by it"""


def parse(architecture: str, config: ConfigFields, generation: ConfigFields) -> GraniteSpec:
    """Raises ModelError naming the field."""
    refuse_other_activation(config, "silu")
    config = with_defaults(config, DEFAULTS)
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    factors = {name: config.positive_number(name, default=1.0) for name in names}
    return extended(parse_decoder(architecture, RULES, config, generation), GraniteSpec, **factors)


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree, without tensors."""
    assert isinstance(spec, GraniteSpec)
    blocks = [GraniteBlock(build, spec, layer) for layer in range(spec.num_layers)]
    stack = GraniteStack(Embedding(build, spec.vocab_size, spec.hidden_size), blocks, _norm(spec))
    stack.multiplier = spec.embedding_multiplier
    return GraniteLM(build, spec, stack)


def _norm(spec: ModelSpec) -> RMSNorm:
    return RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class GraniteBlock(LlamaBlock):
    """Each branch is multiplied before it is added."""

    def __init__(self, build: Build, spec: GraniteSpec, layer: int) -> None:
        shape = attention_shape(spec, layer)
        shape = replace(shape, scores=replace(shape.scores, scale=spec.attention_multiplier))
        super().__init__(spec, Attention(build, shape), gated_mlp(build, spec))
        self._multiplier = spec.residual_multiplier

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended = self.self_attn(self.input_layernorm.of_sum(branch, residual), step, cache).mul_(self._multiplier)
        residual = rows_read(residual, step)
        branch = self.mlp(self.post_attention_layernorm.of_sum(attended, residual))
        return branch.mul_(self._multiplier), residual


class GraniteStack(Stack):
    """Embeddings are multiplied."""

    multiplier: float

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return super().embed(token_ids).mul_(self.multiplier)


class GraniteLM(CausalLM):
    """Logits are divided."""

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.spec, GraniteSpec)
        return super().logits(hidden, out).div_(self.spec.logits_scaling)
