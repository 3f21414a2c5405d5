"""What a worker does differently from device to device, behind one interface; here the CPU's side of it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import ExecuteStep, SampledTokens, WorkerConfig
from sempre.kernels.linear.cpu import ROW_BLOCK
from sempre.kernels.threads import set_num_threads
from sempre.workers.fingerprint import fingerprint_parts
from sempre.workers.kv_cache import BLOCK_SIZE, PagedKvCache, available_blocks, block_bytes
from sempre.workers.model_runner import ModelRunner
from sempre.workers.models.decoder import Decoder
from sempre.workers.models.numerics import LinearKernel
from sempre.workers.models.spec import ModelSpec
from sempre.workers.sampling import GrammarCompiler
from sempre.workers.self_test import self_test
from sempre.workers.weights import ON_CPU, DecoderWeights, Placement


@dataclass(frozen=True)
class ModelOutline:
    """What is known of a model before its weights are."""

    config: WorkerConfig
    spec: ModelSpec
    product: LinearKernel
    max_model_len: int
    block_size: int


@dataclass(frozen=True)
class LoadedModel:
    """What a backend knows of the model once its weights are on the device."""

    config: WorkerConfig
    spec: ModelSpec
    weights: DecoderWeights
    product: LinearKernel
    max_model_len: int
    block_size: int
    """tokens in one KV cache block: the config's, or the device's best"""

    @property
    def block_bytes(self) -> int:
        """Of one KV cache block."""
        return block_bytes(self.spec, self.block_size, self.weights.dtype)

    def make_grammar_compiler(self) -> GrammarCompiler:
        """For the model's own tokenizer."""
        return GrammarCompiler(Path(self.config.model_path), self.spec.vocab_size)


class Runner(Protocol):
    """Computes steps; the limits are those of the warm-up too."""

    cache: PagedKvCache
    max_model_len: int
    max_num_batched_tokens: int

    def execute(self, step: ExecuteStep) -> list[SampledTokens]:
        """One result per scheduled request, in order. Raises MessageMalformed when the step itself is wrong."""


@runtime_checkable
class PipelinedRunner(Runner, Protocol):
    """Takes a step while the one before it runs."""

    def submit(self, step: ExecuteStep) -> None:
        """Queue a step on the device. Raises as `execute` does."""

    def step_done(self) -> bool:
        """Whether `collect` would not wait."""

    def collect(self) -> list[SampledTokens]:
        """The result of the oldest step submitted and not collected."""


class Compilation(Protocol):
    """Kernels that are being compiled."""

    def finish(self) -> None:
        """Wait for them. Raises what a compilation raised."""


class Backend(Protocol):
    """One worker's device."""

    block_sizes: tuple[int, ...]
    """sizes that the kernels take, the best first"""
    max_steps_in_flight: int
    """known once `begin` has been called"""
    max_prompt_tokens: int | None
    """tokens of prompts in a step from which on more would not be faster, but later for all others; None: no matter"""

    @property
    def placement(self) -> Placement: ...

    def best_step_tokens(self, max_num_seqs: int) -> int:
        """Most tokens in one step, where the settings leave it open."""

    def begin(self, config: WorkerConfig) -> None:
        """Before anything is loaded."""

    def loading(self, outline: ModelOutline) -> AbstractContextManager[Compilation]:
        """Around the loading of weights: compiles meanwhile what the model will need. Raises ConfigError with the sums
        when memory runs out inside."""

    def self_test(self, model: LoadedModel) -> tuple[LoadedModel, dict[str, int]]:
        """Comparisons passed by operation, and the model without what did not agree. Raises InvarianceError."""

    def available_blocks(self, model: LoadedModel, draft: LoadedModel | None = None) -> int:
        """KV cache blocks that fit, with as many of the draft model that shares the device.

        Raises ConfigError with the sums when not even one full sequence does.
        """

    def make_runner(self, model: LoadedModel, num_blocks: int) -> Runner: ...

    def prepare_steps(self, runner: Runner) -> dict[str, str]:
        """After the warm-up: whatever makes steps fast; the parts of the fingerprint that are known only now."""

    def fingerprint(self, model: LoadedModel) -> dict[str, str]: ...

    def memory(self) -> dict[str, int]:
        """Bytes in use, by name."""

    def end(self) -> None:
        """Give back what `begin` took."""


class _NothingToCompile:
    """The CPU's kernels are compiled as they first run."""

    def finish(self) -> None:
        return


class CpuBackend:
    """The CPU."""

    placement = ON_CPU
    block_sizes: tuple[int, ...] = (BLOCK_SIZE,)
    max_prompt_tokens: int | None = ROW_BLOCK

    def __init__(self) -> None:
        self._torch_threads_before = torch.get_num_threads()
        self.max_steps_in_flight = 2

    def best_step_tokens(self, max_num_seqs: int) -> int:
        return max_num_seqs + ROW_BLOCK

    def begin(self, config: WorkerConfig) -> None:
        cores = len(os.sched_getaffinity(0))
        if config.num_threads > cores:
            raise ConfigError(
                f"num_threads: expected at most the {cores} usable cores, found {config.num_threads}.",
                parameter="num_threads",
                value=config.num_threads,
            )
        set_num_threads(config.num_threads or max(1, cores // config.world_size))
        # the next step waits at the worker, which is then never idle; guesses, though, follow from results
        self.max_steps_in_flight = 1 if config.max_draft_tokens else 2

    def loading(self, outline: ModelOutline) -> AbstractContextManager[Compilation]:
        return nullcontext(_NothingToCompile())

    def self_test(self, model: LoadedModel) -> tuple[LoadedModel, dict[str, int]]:
        config = model.config
        _leave_cores_to_kernels()
        passed = self_test(
            model.spec,
            model.weights,
            model.product,
            block_size=model.block_size,
            max_tokens=config.max_num_batched_tokens,
        )
        return model, passed

    def available_blocks(self, model: LoadedModel, draft: LoadedModel | None = None) -> int:
        block_bytes = model.block_bytes + (draft.block_bytes if draft is not None else 0)
        return available_blocks(model.config, block_bytes, model.block_size, model.max_model_len)

    def make_runner(self, model: LoadedModel, num_blocks: int) -> ModelRunner:
        config = model.config
        _leave_cores_to_kernels()
        decoder = Decoder(
            model.spec,
            model.weights,
            model.product,
            max_tokens=config.max_num_batched_tokens,
            max_model_len=model.max_model_len,
        )
        return ModelRunner(
            decoder,
            PagedKvCache(model.spec, num_blocks, model.block_size, model.weights.dtype),
            model.make_grammar_compiler(),
            max_model_len=model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_draft_tokens=config.max_draft_tokens,
            rank=config.rank,
        )

    def prepare_steps(self, runner: Runner) -> dict[str, str]:
        return {}

    def fingerprint(self, model: LoadedModel) -> dict[str, str]:
        return fingerprint_parts(model.weights, model.config.numerics)

    def memory(self) -> dict[str, int]:
        """Resident now and at its peak, of the process."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
        }

    def end(self) -> None:
        torch.set_num_threads(self._torch_threads_before)


def _leave_cores_to_kernels() -> None:
    """torch's own threads would compete with the kernels' for the same cores."""
    torch.set_num_threads(1)


def make_backend(device: torch.device) -> Backend:
    """The backend of a resolved device."""
    if device.type == "cpu":
        return CpuBackend()
    from sempre.workers.gpu.backend import GpuBackend

    return GpuBackend(device)
