"""A worker's CPU: loading, self-test, memory, and the runner."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from sempre.ipc.messages import WorkerConfig
from sempre.ipc.rank_links import RankLinks
from sempre.kernels.linear.cpu import ROW_BLOCK
from sempre.kernels.threads import get_num_threads, set_num_threads, settle_threads
from sempre.workers.backend import Compilation, LoadedModel, ModelSetup
from sempre.workers.cpu.compilation import SamplingCompilation
from sempre.workers.cpu.drafter import CpuDraftModelRunner
from sempre.workers.cpu.linked_replica import LinkedReplica
from sempre.workers.cpu.pooling_runner import CpuPoolingRunner
from sempre.workers.cpu.replica_file import ReplicaFile
from sempre.workers.cpu.runner import CpuModelRunner
from sempre.workers.cpu.stage_runner import CpuStageRunner
from sempre.workers.device import DeviceSpeed
from sempre.workers.fingerprint import fingerprint_parts
from sempre.workers.host_memory import give_back_free_memory
from sempre.workers.kv_cache import available_sizes
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.loading import ON_CPU
from sempre.workers.models.config import ModelSpec
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.runner import ModelRunner
from sempre.workers.sampling import reports_of
from sempre.workers.self_test import check_linears, check_model, require_equal
from sempre.workers.state_cache import CacheSizes
from sempre.workers.tensor_source import CPU

# longer ones would only take more memory
_MOST_PROMPT_TOKENS = 2048
# a mask that is not ready by then is requested again in the next step
_FORM_WAIT_S = 0.02
# more rows make a step proportionally longer
_DEFAULT_MAX_NUM_SEQS = 128


class _NothingToCompile:
    """The kernels of a model are compiled when they first run: in the self-test."""

    def finish(self) -> dict[str, float]:
        return {}


class CpuBackend:
    """The CPU."""

    placement = ON_CPU
    # one thread, tiny-draft to SmolLM2-135M; a row costs 0.1 to 0.2 steps beside one other, 0.5 beside many
    speed = DeviceSpeed(
        step_seconds=0.3e-3, layer_seconds=20e-6, bytes_per_second=12e9, row_share=0.5, result_seconds=0.2e-3
    )

    def __init__(self) -> None:
        self.max_num_batched_tokens = ROW_BLOCK
        self.max_prompt_tokens: int | None = ROW_BLOCK
        self.max_steps_in_flight = 1
        # planning, the transfer to a worker, and slack for a busy machine
        self.step_lead_s = 0.008
        self._compilation: SamplingCompilation | None = None

    def begin(self, config: WorkerConfig) -> None:
        self._compilation = SamplingCompilation.start()
        threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // config.world_size)
        set_num_threads(threads)
        settle_threads()
        self.max_prompt_tokens = min(ROW_BLOCK * threads, _MOST_PROMPT_TOKENS)
        self.max_num_batched_tokens = (config.max_num_seqs or _DEFAULT_MAX_NUM_SEQS) + self.max_prompt_tokens
        # the next step is queued at the worker, which is never idle; drafts, though, depend on results
        self.max_steps_in_flight = 1 if config.max_draft_tokens else 2

    def join(self, config: WorkerConfig, shared_memory: int, links: RankLinks | None) -> Parallel:
        size, rank = config.tensor_parallel_size, config.rank % config.replica_size
        stages, patience_s = config.pipeline_parallel_size, max(config.startup_timeout_s, config.step_timeout_s)
        file: ReplicaFile | LinkedReplica = ReplicaFile(
            shared_memory, size, stages, rank, threads=get_num_threads(), patience_s=patience_s
        )
        exchange = file.exchange() if links is None or not config.stage_crosses_nodes else None
        if links is not None:
            file = LinkedReplica(links, size, stages, rank, first=config.rank - rank, patience_s=patience_s)
        stage = file.stage()
        if stage.count > 1:
            # stages are busy with parts of two steps at once, so the next one is sent without delay
            self.step_lead_s = 0.0
        return parallel_of(config.profile, rank % size, size, exchange or file.exchange(), stage=stage)

    def default_max_num_seqs(self, config: WorkerConfig, spec: ModelSpec) -> int:
        return _DEFAULT_MAX_NUM_SEQS

    def loading(self, setup: ModelSetup) -> AbstractContextManager[Compilation]:
        return nullcontext(_NothingToCompile())

    def self_test(self, model: LoadedModel) -> dict[str, int]:
        _leave_cores_to_kernels()
        most = model.max_num_batched_tokens
        comparisons = [
            *check_linears(model.model, model.weights.matrix_dtype, most),
            *check_model(model.model, model.weights, model.block_size, max_tokens=most),
        ]
        return require_equal(comparisons)

    def attention_workspace(self, model: LoadedModel) -> None:
        """None: attention on a CPU needs none."""

    def available_sizes(self, model: LoadedModel, draft: LoadedModel | None = None) -> CacheSizes:
        draft_bytes, draft_states = (0, 0) if draft is None else (draft.block_bytes, draft.states.own_bytes)
        return available_sizes(
            model.config,
            model.block_bytes + draft_bytes,
            model.states,
            block_size=model.block_size,
            max_model_len=model.max_model_len,
            draft_bytes_per_block=draft_bytes,
            draft_state_bytes=draft_states,
        )

    def make_runner(self, model: LoadedModel, sizes: CacheSizes) -> ModelRunner:
        config = model.config
        if self._compilation is not None:
            self._compilation.finish()
        give_back_free_memory()
        _leave_cores_to_kernels()
        scratch = Scratch(model.max_num_batched_tokens, model.max_model_len, model.weights.activations, CPU)
        allocate(model.model, scratch)
        # ranks must agree on what a step samples, so none of them gives up on a mask
        step_wait_s = _FORM_WAIT_S if model.parallel.is_alone else None
        grammars = model.make_grammar_compiler(step_wait_s=step_wait_s)
        cache, limits = model.allocate_cache(sizes), model.limits(sizes)
        if model.spec.pooling is not None:
            return CpuPoolingRunner(model.model, cache, grammars, limits, rank=config.rank)
        kind = CpuStageRunner if model.parallel.stage.count > 1 else CpuModelRunner
        reports = reports_of(config.logprobs_mode)
        return kind(model.model, cache, grammars, limits, rank=config.rank, reports=reports)

    def make_drafter(self, runner: ModelRunner) -> CpuDraftModelRunner:
        assert isinstance(runner, CpuModelRunner)
        return CpuDraftModelRunner(runner)

    def prepare_steps(self, runner: ModelRunner) -> dict[str, str]:
        return {}

    def fingerprint(self, model: LoadedModel) -> dict[str, str]:
        return fingerprint_parts(model.weights, model.config.numerics)

    def memory(self) -> dict[str, int]:
        """Resident memory of the process, now and at its peak."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
        }

    def end(self) -> None:
        if self._compilation is not None:
            self._compilation.close()


def _leave_cores_to_kernels() -> None:
    """torch's own threads would compete with the kernels' for the same cores."""
    torch.set_num_threads(1)
