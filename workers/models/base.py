"""What all decoder models share: a stack of blocks between an embedding and a norm, and logits.

# T tokens in the step, S rows that are read, H hidden size, V vocabulary
The residual stream and all activations are float32 on the CPU and in the model's dtype on a GPU; logits are float32.
With dtype bfloat16 on a CPU, the inputs of matmuls are rounded to it, see `kernels.linear`.
In effect every operation works on one row at a time, so a row's bits depend only on its own request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from sempre.ipc.errors import ModelError
from sempre.kernels.attention import KvCache
from sempre.kernels.states import LayerState
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Module, Scratch
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.layers.row_parallel import Unsummed
from sempre.workers.layers.vocabulary import Head, TiedHead, TokenLinear
from sempre.workers.models.config import LayerKv, ModelSpec
from sempre.workers.steps import StepInput
from sempre.workers.tensor_source import ModelPart

LayerCache = KvCache | LayerState
Branch = torch.Tensor | Unsummed


class Block(Protocol):
    """One decoder layer, a Module."""

    def __call__(
        self, branch: Branch | None, residual: torch.Tensor, step: StepInput, cache: Any
    ) -> tuple[Branch | None, torch.Tensor]:
        """The branch still to be added [S, H], if any, and the residual stream [S, H], for the rows that are read.

        `branch` is the previous block's, None for the first. `cache` is the layer's: a KvCache, or its LayerState. Rows
        that are not read may be dropped once the cache has what later rows need of them.
        """


def rows_read(rows: torch.Tensor, step: StepInput) -> torch.Tensor:
    """The rows of [T, H] that are read [S, H]."""
    return rows if step.outputs is None else rows.index_select(0, step.outputs.rows)


class Stack(Module):
    """`model.`: embedding, blocks, final norm."""

    def __init__(self, embed_tokens: Embedding, layers: Sequence[Block], norm: RMSNorm) -> None:
        self.embed_tokens = embed_tokens
        self.layers = list(layers)
        self.norm = norm

    def __call__(self, step: StepInput, caches: Sequence[LayerCache]) -> torch.Tensor:
        branch: Branch | None = None
        residual = self.embed(step.token_ids)
        # nothing reads the other rows once the last keys and values are cached
        all_rows, last = replace(step, outputs=None), len(self.layers) - 1
        for index, (block, cache) in enumerate(zip(self.layers, caches, strict=True)):
            branch, residual = block(branch, residual, step if index == last else all_rows, cache)
        return self.norm.of_sum(branch, residual)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the first block [T, H]."""
        return self.embed_tokens(token_ids)


def _own_kv(layer: LayerKv, block: Block) -> LayerKv:
    if not layer.num_kv_heads or not isinstance(block, Module):
        return layer
    attention = next(module for _, module in block.walk() if isinstance(module, Attention))
    return layer._replace(num_kv_heads=attention.heads.num_kv_heads)


class CausalLM(Module):
    """A whole model: what runners call, and the facts about it."""

    part: ModelPart | None = None
    """which part of the checkpoint it is; None: all"""
    may_stack_experts = False
    """whether a checkpoint may hold all experts of a layer in one tensor (`SeparateExperts`)"""
    unread: tuple[str, ...] = ()
    """prefixes of tensors that a checkpoint may hold though nothing reads them"""
    score: Linear | None = None
    """the head of a model that classifies"""

    def __init__(self, build: Build, spec: ModelSpec, model: Stack) -> None:
        self.spec = spec
        self.parallel = build.parallel
        self.model = model
        if spec.tie_word_embeddings:
            self.lm_head: Head = TiedHead(build, model.embed_tokens)
        else:
            self.lm_head = Head(build, spec.vocab_size, spec.hidden_size)

    def pool(self, build: Build) -> None:
        """Replace the vocabulary's head by what `spec.pooling` needs; before anything is loaded."""
        spec, pooling = self.spec, self.spec.pooling
        assert pooling is not None
        head = pooling.head
        own_head = self.lm_head
        del self.lm_head
        if head is None or head.tokens is None:
            # a checkpoint may hold it all the same
            if not spec.tie_word_embeddings:
                self.unread = (*self.unread, "lm_head.")
            if head is not None:
                self.score = Linear(build, {"score": head.num_rows}, spec.hidden_size, use=Use.LOGITS)
        elif type(self).logits is not CausalLM.logits or own_head.bias:
            raise ModelError(
                f"config.json: classifier_from_token: expected a family whose logits are a plain matmul, found"
                f" {spec.architecture}."
            )
        else:
            shape = (spec.vocab_size, spec.hidden_size)
            self.score = TokenLinear(build, head.tokens, shape, tied=spec.tie_word_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def allocate(self, scratch: Scratch) -> None:
        self._adapters = scratch.adapters

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """All linear layers, with their paths."""
        for path, module in self.walk():
            if isinstance(module, Linear):
                yield path, module

    @property
    def kv_layers(self) -> tuple[LayerKv, ...]:
        """What each layer keeps in the KV cache of this rank: the heads of its attention."""
        return tuple(_own_kv(layer, block) for layer, block in zip(self.spec.kv_layers, self.model.layers, strict=True))

    @property
    def copies(self) -> dict[str, str]:
        """Tensors that a checkpoint may hold but are not read, each with the tensor it is a copy of."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.spec.tie_word_embeddings else {}

    def forward(self, step: StepInput, caches: Sequence[LayerCache]) -> torch.Tensor:
        """Write the step's keys, values and states into `caches` (one per layer); return the final hidden states.

        Those of the rows in `step.outputs` [S, H], or of all rows [T, H], as a view of a buffer that the next call
        overwrites.
        """
        self._adapters.step = step.adapters
        return self.model(step, caches)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of the given final hidden states [S, H], written to and returned as `out` [S, V]."""
        return self.lm_head.into(hidden, out)

    def scores(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What the score head says of the given rows [S, H], written to and returned as `out` [S, N]."""
        assert self.score is not None
        return self.score.into(hidden, out)
