"""A model's tree with a gradient: its own classes and its own order of operations, with other leaves.

A family is trainable if its tree consists of modules that have a gradient here; the others are refused by name. Its
tensors are loaded anew whenever parameters have changed, from the parameters, by the code that loads a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sempre.ipc.errors import ModelError
from sempre.kernels.activation import Activation
from sempre.kernels.attention import KvCache
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import HeadsLinear, Linear
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Module, RowBuffer, Scratch
from sempre.workers.layers.norm import HeadNorm, OffsetHeadNorm, OffsetRMSNorm, RMSNorm
from sempre.workers.layers.row_parallel import RowParallelLinear
from sempre.workers.layers.vocabulary import Head, TiedHead
from sempre.workers.models.base import Branch, CausalLM, Stack
from sempre.workers.models.gemma2 import CappedLM, GemmaBlock, GemmaSpec, ScaledStack
from sempre.workers.models.glm import Glm4Block, GlmBlock
from sempre.workers.models.granite import GraniteBlock, GraniteLM, GraniteSpec, GraniteStack
from sempre.workers.models.llama import LlamaBlock
from sempre.workers.steps import StepInput
from sempre.workers.trainer import operations
from sempre.workers.trainer.attention import AttentionCall, attention
from sempre.workers.trainer.operations import TrainedWeight, rounded


class _Norm(RMSNorm):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return operations.norm(x, self.weight, self.eps)

    def of_sum(self, branch: Branch | None, residual: torch.Tensor) -> torch.Tensor:
        if branch is None:
            return self(residual)
        assert isinstance(branch, torch.Tensor), "a trainer has the whole model"
        return operations.norm_of_sum(branch, residual, self.weight, self.eps)


class _OffsetNorm(_Norm, OffsetRMSNorm):
    pass


class _Embedding(Embedding):
    stored: torch.dtype
    activations: torch.dtype

    def allocate(self, scratch: Scratch) -> None:
        assert isinstance(scratch, NoScratch)
        self.stored, self.activations = scratch.stored, scratch.activations

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return operations.embedded(token_ids, self.weight, self.stored, self.activations)


class _Attention(Attention):
    def attend_rows(self, rows: torch.Tensor, step: StepInput, cache: KvCache) -> torch.Tensor:
        norms = self._norms
        call = AttentionCall(
            heads=self.heads,
            scores=self._scores,
            table=self._table,
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            batch=step.batch,
            cache=cache,
            workspace=self._workspace,
            eps=None if norms is None else norms.eps,
        )
        of_q, of_k = (None, None) if norms is None else (norms.q, norms.k)
        return attention(rows, of_q, of_k, call)


_WITH_GRADIENT: dict[type[Module], type[Module]] = {
    RMSNorm: _Norm,
    OffsetRMSNorm: _OffsetNorm,
    Embedding: _Embedding,
    Attention: _Attention,
}
# they compute by the modules within them, by the kernel that is given, or by torch
_AS_THEY_ARE = frozenset(
    [
        CappedLM, CausalLM, GatedMLP, GemmaBlock, Glm4Block, GlmBlock, GraniteBlock, GraniteLM, GraniteStack, Head,
        HeadNorm, HeadsLinear, Linear, LlamaBlock, OffsetHeadNorm, RowParallelLinear, ScaledStack, Stack, TiedHead,
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NoScratch(Scratch):
    """Buffers of no memory, since every result is a tensor of its own; tables of rope are kept."""

    stored: torch.dtype
    """of matrices"""

    def rows(self, role: str, width: int) -> RowBuffer:
        row = torch.empty((1, width), dtype=self.activations, device=self.device)
        return RowBuffer(row.expand(self.max_tokens, width))


class Parameters:
    """A trainer's parameters as a checkpoint's tensors, rounded as the engine rounds them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], matrices: torch.dtype, vectors: torch.dtype) -> None:
        self._parameters = parameters
        self._matrices = matrices
        self._vectors = vectors

    def read(self, name: str) -> torch.Tensor:
        return self._parameters[name]

    def vector(self, name: str) -> torch.Tensor:
        return rounded(self._parameters[name], self._vectors)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return rounded(tensor, self._matrices)


class TrainingKernel:
    """The engine's matmul with a gradient. What it packs is kept until `changed` says that parameters have changed."""

    def __init__(self, inner: LinearKernel, stored: torch.dtype, input_dtype: torch.dtype) -> None:
        """`stored`: the dtype of matrices; `input_dtype`: what inputs are rounded to."""
        self._inner = inner
        self._stored = stored
        self._input_dtype = input_dtype
        self._packed: list[LinearWeight] = []
        self._next = 0

    def changed(self, *, parameters: bool) -> None:
        """The tree is about to be loaded again."""
        self._next = 0
        if parameters:
            self._packed.clear()

    def seam(self) -> LinearKernel:
        """The form in which a tree takes it."""
        return self._inner._replace(pack=self._pack, linear=self._linear, gated_linear=self._gated)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int = 1) -> TrainedWeight:
        if self._next == len(self._packed):
            plain = None if bias is None else bias.detach().clone()
            self._packed.append(self._inner.pack(weight.detach().to(self._stored), plain, leaves))
        self._next += 1
        return TrainedWeight(self._packed[self._next - 1], weight, bias, self._input_dtype)

    def _linear(self, x: torch.Tensor, weight: TrainedWeight, out: torch.Tensor) -> torch.Tensor:
        return operations.linear(x, weight, self._inner.linear, out.dtype)

    def _gated(
        self, x: torch.Tensor, weight: TrainedWeight, scratch: torch.Tensor, out: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        return operations.and_mul(self._linear(x, weight, scratch), activation)


def give_gradients(model: CausalLM) -> None:
    """Replace the leaves of a tree that nobody else has. Raises ModelError for what has no gradient, by its path."""
    for path, module in model.walk():
        kind = type(module)
        if reason := _refusal(module):
            raise ModelError(
                f"{model.spec.architecture}: {path or 'the model'}: {reason} has no gradient. The trainer knows"
                f" {', '.join(sorted(known.__name__ for known in _AS_THEY_ARE if known.__name__.endswith('Block')))}."
            )
        module.__class__ = _WITH_GRADIENT.get(kind, kind)


def _refusal(module: Module) -> str | None:
    """What of a module has no gradient, if anything."""
    kind = type(module)
    if kind not in _WITH_GRADIENT and kind not in _AS_THEY_ARE:
        return kind.__name__
    if isinstance(module, Linear) and module.activation is Activation.CLAMPED:
        return "a clamped activation"
    if isinstance(module, Attention) and (module.has_sinks or module.heads.kv_parts != 2):
        return "attention with sinks, or with keys of another layer,"
    return None


def logit_slope(model: CausalLM, logits: torch.Tensor) -> torch.Tensor | float:
    """The derivative of a model's logits with respect to those of the plain matmul, at these logits."""
    spec = model.spec
    if isinstance(spec, GemmaSpec) and spec.logit_cap is not None:
        return 1 - (logits / spec.logit_cap).square()
    return 1 / spec.logits_scaling if isinstance(spec, GraniteSpec) else 1.0
