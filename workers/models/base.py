"""What all decoder models share: a stack of blocks between an embedding and a norm, and logits.

# T tokens in the step, S rows that are read, H hidden size, V vocabulary
The residual stream and all activations are float32 on the CPU and in the model's dtype on a GPU; logits are float32.
With dtype bfloat16 on a CPU, the inputs of matmuls are rounded to it, see `kernels.linear`.
In effect every operation works on one row at a time, so a row's bits depend only on its own request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

import torch

from sempre.ipc.errors import ModelError
from sempre.kernels.attention import KvCache
from sempre.kernels.states import LayerState, StateShape
from sempre.workers.layers.attention import Attention
from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Module, Scratch
from sempre.workers.layers.norm import RMSNorm
from sempre.workers.layers.row_parallel import Unsummed
from sempre.workers.layers.stage_input import StageInput, sums_read
from sempre.workers.layers.vocabulary import Head, TiedHead, TokenLinear
from sempre.workers.models.config import LayerKv, ModelSpec
from sempre.workers.stages import ALL_LAYERS, Stage
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


class Stack(Module):
    """`model.`: embedding, blocks, final norm. A stage computes `own_layers`."""

    input: StageInput | None = None
    """of a stage that is not the first"""

    def __init__(self, embed_tokens: Embedding, layers: Sequence[Block], norm: RMSNorm) -> None:
        self.embed_tokens = embed_tokens
        self.set_layers(layers)
        self.norm = norm
        self._stage = ALL_LAYERS

    def set_layers(self, layers: Sequence[Block]) -> None:
        """Have these blocks, and compute all of them."""
        self.layers = list(layers)
        self.own_layers = range(len(self.layers))
        self.elsewhere = frozenset(name for name in self.elsewhere if not name.startswith("layers."))

    def keep_stage(self, stage: Stage, *, keep_table: bool) -> None:
        """Leave out what other stages have; `keep_table`: the head is the embedding's table. Raises ConfigError."""
        own = stage.layers(len(self.layers))
        elsewhere = {f"layers.{index}" for index in range(len(self.layers)) if index not in own}
        if not stage.is_first:
            self.input = StageInput(stage, self.embed_tokens.width)
            elsewhere |= set() if stage.is_last and keep_table else {"embed_tokens"}
        if not stage.is_last:
            elsewhere.add("norm")
        self._stage, self.own_layers, self.elsewhere = stage, own, frozenset(elsewhere)

    def __call__(self, step: StepInput, caches: Sequence[LayerCache]) -> torch.Tensor:
        branch: Branch | None = None
        if self.input is None:
            residual = self.embed(step.token_ids)
        else:
            branch, residual = self.input(step)
        # nothing reads the other rows once the last keys and values are cached
        all_rows, last = replace(step, outputs=None), self.own_layers.stop - 1 if self._stage.is_last else None
        for index in self.own_layers:
            block, cache = self.layers[index], caches[index]
            branch, residual = block(branch, residual, step if index == last else all_rows, cache)
        if last is not None:
            return self.norm.of_sum(branch, residual)
        assert self._stage.link is not None
        assert not isinstance(branch, Unsummed), "stages are on CPUs"
        self._stage.link.pass_on(branch, residual)
        return sums_read(branch, residual, step)

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

    def keep_stage(self) -> None:
        """Leave out what other stages have, before anything is loaded. Raises ConfigError for a model that the stages
        cannot share."""
        stage = self.parallel.stage
        if stage.count == 1:
            return
        if self.spec.pooling is not None:
            raise stage.refused("one stage for a model that pools")
        self.model.keep_stage(stage, keep_table=self.spec.tie_word_embeddings)
        own = self.model.own_layers
        for index in own:
            source = self.spec.kv_layers[index].source
            if source is not None and source not in own:
                raise stage.refused(f"layer {source} together with layer {index}, which reads its keys and values")
        if not stage.is_last:
            self.elsewhere = frozenset({"lm_head"})

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
        return next(tensor for _, module in self.walk() for tensor in module.own_tensors()).device

    def allocate(self, scratch: Scratch) -> None:
        self._adapters = scratch.adapters

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """All linear layers, with their paths."""
        for path, module in self.walk():
            if isinstance(module, Linear):
                yield path, module

    @property
    def all_stages(self) -> CausalLM:
        """This tree with what other stages have, which is not loaded."""
        whole = copy(self)
        whole.model = copy(self.model)
        whole.elsewhere = whole.model.elsewhere = frozenset()
        return whole

    @property
    def kv_layers(self) -> tuple[LayerKv, ...]:
        """What each layer keeps in the KV cache of this rank: the heads of its attention, none of another stage's."""
        own, layers = self.model.own_layers, zip(self.spec.kv_layers, self.model.layers, strict=True)
        return tuple(
            _own_kv(layer, block) if index in own else LayerKv(0, layer.head_dim)
            for index, (layer, block) in enumerate(layers)
        )

    @property
    def layer_states(self) -> tuple[StateShape | None, ...]:
        """What each layer keeps of a sequence; None: nothing, or another stage has the layer."""
        own = self.model.own_layers
        return tuple(shape if index in own else None for index, shape in enumerate(self.spec.layer_states))

    @property
    def copies(self) -> dict[str, str]:
        """Tensors that a checkpoint may hold but are not read, each with the tensor it is a copy of."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.spec.tie_word_embeddings else {}

    def forward(self, step: StepInput, caches: Sequence[LayerCache]) -> torch.Tensor:
        """Write the step's keys, values and states into `caches` (one per layer); return the final hidden states.

        Those of the rows in `step.outputs` [S, H], or of all rows [T, H], as a view of a buffer that the next call
        overwrites. A stage before the last passes its hidden states on, and returns those of the same rows.
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
