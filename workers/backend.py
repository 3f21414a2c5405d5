"""What a worker does differently from device to device, behind one interface."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from sempre.ipc.messages import WorkerConfig
from sempre.ipc.rank_links import RankLinks
from sempre.kernels.attention import AttentionWorkspace
from sempre.workers.adapters.store import AdapterStore
from sempre.workers.device import DeviceSpeed
from sempre.workers.drafters.base import DraftModelRunner
from sempre.workers.kv_cache import PagedKvCache, block_bytes
from sempre.workers.layers.linear_kernel import LinearKernel
from sempre.workers.loading import Placement, WeightFacts
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec
from sempre.workers.parallel import ALONE, Parallel
from sempre.workers.runner import ModelRunner
from sempre.workers.sampling import GrammarCompiler
from sempre.workers.state_cache import CacheSizes, StateCache, StateNeeds, slot_bytes
from sempre.workers.step_validation import StepLimits
from sempre.workers.tensor_source import CPU


@dataclass(frozen=True)
class ModelSetup:
    """What is known of a model before its weights are loaded."""

    config: WorkerConfig
    spec: ModelSpec
    kernel: LinearKernel
    max_model_len: int
    block_size: int
    """tokens in one KV cache block: the config's, or the device's best"""
    max_num_batched_tokens: int
    """most tokens in one step, likewise"""
    max_num_seqs: int
    """most requests in one step, likewise"""
    parallel: Parallel = field(default=ALONE, kw_only=True)


@dataclass(frozen=True)
class LoadedModel(ModelSetup):
    """What a backend knows of the model once its weights are on the device."""

    model: CausalLM
    weights: WeightFacts
    adapters: AdapterStore | None = None
    """None: none are served"""

    def limits(self, sizes: CacheSizes) -> StepLimits:
        return StepLimits(
            self.max_model_len,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.spec.vocab_size,
            self.config.max_draft_tokens,
            sizes.num_state_slots,
            0 if self.adapters is None else self.config.num_adapter_slots,
        )

    def allocate_cache(self, sizes: CacheSizes, device: torch.device = CPU) -> PagedKvCache:
        """The KV cache, and the states of layers that keep them."""
        model, weights = self.model, self.weights
        states = StateCache(model.layer_states, sizes.num_state_slots, weights.activations, device)
        return PagedKvCache(model.kv_layers, sizes.num_blocks, self.block_size, weights.kv_dtype, device, states)

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV cache block; at least 1, also of a stage without attention."""
        return max(1, block_bytes(self.model.kv_layers, self.block_size, self.weights.kv_dtype))

    @property
    def states(self) -> StateNeeds:
        config = self.config
        size = slot_bytes(self.model.layer_states, self.weights.activations)
        uses_spare = config.enable_prefix_caching or config.speculative_config is not None
        return StateNeeds(size, self.max_num_seqs, uses_spare, is_draft=config.role == "draft")

    def make_grammar_compiler(self, *, step_wait_s: float | None = None) -> GrammarCompiler:
        """For the model's own tokenizer."""
        return GrammarCompiler(Path(self.config.model_path), self.spec.vocab_size, step_wait_s=step_wait_s)


class Compilation(Protocol):
    """Kernels being compiled."""

    def finish(self) -> dict[str, float]:
        """Wait for them; seconds by phase. Raises what a compilation raised."""


class Backend(Protocol):
    """One worker's device."""

    max_num_batched_tokens: int
    """used where the config has none; known once `begin` has been called"""
    max_prompt_tokens: int | None
    """prompt tokens in a step beyond which more would only delay the other requests; None: no such number; known once
    `begin` has been called"""
    step_lead_s: float
    """how long before a step ends the next one is sent; 0: at once"""
    max_steps_in_flight: int
    """known once `begin` has been called"""
    speed: DeviceSpeed

    @property
    def placement(self) -> Placement: ...

    def begin(self, config: WorkerConfig) -> None:
        """Called before anything is loaded."""

    def join(self, config: WorkerConfig, shared_memory: int, links: RankLinks | None) -> Parallel:
        """Join the other ranks of the replica, with which the worker shares this file, or has these links where some
        are on other hosts; after `begin`. Raises ConfigError for ranks or stages that the device does not have."""

    def default_max_num_seqs(self, config: WorkerConfig, spec: ModelSpec) -> int:
        """Used where the config has none; after `begin`."""

    def loading(self, setup: ModelSetup) -> AbstractContextManager[Compilation]:
        """A context around loading the weights: compiles the model's kernels meanwhile. Raises ConfigError with the
        sums when memory runs out inside."""

    def self_test(self, model: LoadedModel) -> dict[str, int]:
        """Comparisons passed, by operation; matmul kernels that disagree are no longer used.

        Raises InvarianceError.
        """

    def attention_workspace(self, model: LoadedModel) -> AttentionWorkspace | None:
        """Memory that attention needs on this device, shared by all that runs this model."""

    def available_sizes(self, model: LoadedModel, draft: LoadedModel | None = None) -> CacheSizes:
        """KV cache blocks that fit, together with as many for the draft model that shares the device, beside the
        model's states.

        Raises ConfigError with the sums when not even one sequence of the config's `max_model_len` does, or, where that
        is None, not even one block.
        """

    def make_runner(self, model: LoadedModel, sizes: CacheSizes) -> ModelRunner: ...

    def make_drafter(self, runner: ModelRunner) -> DraftModelRunner:
        """A runner that drafts with the model of `runner`, which takes no more steps itself."""

    def prepare_steps(self, runner: ModelRunner) -> dict[str, str]:
        """Called after the warm-up: does what speeds up steps. Returns the fingerprint's parts that are known only
        now."""

    def fingerprint(self, model: LoadedModel) -> dict[str, str]: ...

    def memory(self) -> dict[str, int]:
        """Bytes in use, by name."""

    def end(self) -> None:
        """Release what `begin` acquired."""
