"""A worker's GPU: loading, self-test, memory, and the runner."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import WorkerConfig
from sempre.ipc.rank_links import RankLinks
from sempre.kernels.attention import AttentionWorkspace
from sempre.kernels.attention.gpu import allocate_attention_workspace
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.packed import PackedWeight, can_unpack
from sempre.workers.backend import LoadedModel, ModelSetup
from sempre.workers.cpu.exchange import SharedMemoryExchange
from sempre.workers.device import DeviceSpeed
from sempre.workers.gpu.compilation import KernelCompilation, weight_bytes
from sempre.workers.gpu.compiler_process import CompilerProcess
from sempre.workers.gpu.drafter import GpuDraftModelRunner
from sempre.workers.gpu.exchange import MEMORY_BYTES, GpuExchange
from sempre.workers.gpu.fingerprint import fingerprint_parts
from sempre.workers.gpu.memory import MemoryPlan, cache_sizes, default_max_num_seqs, out_of_memory
from sempre.workers.gpu.peer_memory import open_peer_memory
from sempre.workers.gpu.pooling_runner import GpuPoolingRunner, PoolingMemory, pinned_upload
from sempre.workers.gpu.runner import GpuModelRunner, StepMemory
from sempre.workers.gpu.self_test import require_fp8, run_self_test
from sempre.workers.gpu.shared_splits import workspace_len
from sempre.workers.gpu.staging import Uploader
from sempre.workers.kv_cache import block_bytes
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.loading import Placement
from sempre.workers.models.config import ModelSpec
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.pooling import Pooler
from sempre.workers.prompt_logprobs import PROMPT_LOGPROB_ROWS
from sempre.workers.runner import ModelRunner
from sempre.workers.sampling import reports_of
from sempre.workers.sampling.gpu_sampler import GpuSampler
from sempre.workers.self_test import require_equal
from sempre.workers.state_cache import CacheSizes, slot_bytes

logger = logging.getLogger(__name__)

HASHING_THREADS = 8
# graphs of plain decoding within these bounds are captured before the first request; others when needed
CAPTURED_ROWS = 1024
CAPTURED_CONTEXTS = (512, 1024)


class GpuBackend:
    """One GPU."""

    max_num_batched_tokens = 8192
    max_prompt_tokens: int | None = None
    step_lead_s = 0.0
    max_steps_in_flight = 2
    # an H100, models of 20 MB to 16 GB
    open_peer_memory = staticmethod(open_peer_memory)
    speed = DeviceSpeed(
        step_seconds=0.2e-3, layer_seconds=20e-6, bytes_per_second=3e12, row_share=0.02, result_seconds=0.3e-3
    )

    def __init__(self, device: torch.device, compiler: CompilerProcess | None) -> None:
        self.device = device
        self._compiler = compiler
        self._exchange: GpuExchange | None = None
        self._excluded: dict[str, list[str]] = {}
        self._workspaces: dict[str, AttentionWorkspace] = {}
        self._steps: dict[str, StepMemory | PoolingMemory] = {}

    @property
    def placement(self) -> Placement:
        return Placement(self.device, Uploader(self.device), HASHING_THREADS, packs=can_unpack(self.device))

    def begin(self, config: WorkerConfig) -> None:
        torch.cuda.set_device(self.device)
        if config.numerics == "invariant":
            from sempre.kernels.linear.gpu import configure

            configure()

    def join(self, config: WorkerConfig, shared_memory: int, links: RankLinks | None) -> Parallel:
        if links is not None:
            raise ConfigError(
                f"nnodes: expected each replica of {config.replica_size} GPUs on one host, found"
                f" {config.ranks_per_node} workers a host. Use data_parallel_size for several hosts with GPUs.",
                parameter="nnodes",
                value=config.nnodes,
            )
        if config.pipeline_parallel_size > 1:
            raise ConfigError(
                f"pipeline_parallel_size: expected 1 on a GPU, found {config.pipeline_parallel_size}. Use"
                " tensor_parallel_size or data_parallel_size for several GPUs, or device='cpu'.",
                parameter="pipeline_parallel_size",
                value=config.pipeline_parallel_size,
            )
        size = config.tensor_parallel_size
        rank, patience_s = config.rank % size, max(config.startup_timeout_s, config.step_timeout_s)
        host = SharedMemoryExchange(shared_memory, rank, size, patience_s=patience_s)
        memory = self.open_peer_memory(host, rank, size, MEMORY_BYTES, self.device)
        self._exchange = GpuExchange(memory, rank, self.device, host, patience_s=patience_s)
        return parallel_of(config.profile, rank, size, devices=self._exchange)

    def default_max_num_seqs(self, config: WorkerConfig, spec: ModelSpec) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        plan = MemoryPlan(
            total=total,
            free=free,
            weights=weight_bytes(spec, config.dtype) // config.tensor_parallel_size,
            activations=0,
            allocated=0,
            utilization=config.gpu_memory_utilization,
        )
        most = default_max_num_seqs(
            plan,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            bytes_per_token=block_bytes(spec.kv_layers, 1, dtype),
            bytes_per_row=row_bytes(spec),
            max_model_len=config.max_model_len,
            bytes_of_states=slot_bytes(spec.layer_states, dtype),
        )
        return self._of_all_ranks(most)

    @contextmanager
    def loading(self, setup: ModelSetup) -> Iterator[KernelCompilation]:
        try:
            with KernelCompilation(setup, self.device, self._compiler) as compilation:
                yield compilation
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise out_of_memory(
                "the weights",
                weights=weight_bytes(setup.spec, setup.config.dtype),
                allocated=torch.cuda.memory_reserved(self.device),
                free=free,
                total=total,
                max_num_batched_tokens=setup.max_num_batched_tokens,
            ) from error

    def self_test(self, model: LoadedModel) -> dict[str, int]:
        require_fp8(model.weights, self.device)
        tested = run_self_test(
            model.model,
            model.weights,
            self.attention_workspace(model),
            block_size=model.block_size,
            max_tokens=model.max_num_batched_tokens,
            max_num_seqs=model.max_num_seqs,
        )
        self._check_ranks()
        passed = require_equal(tested.comparisons)
        self._excluded = tested.excluded
        if tested.excluded:
            logger.warning("self-test: matmul kernels that disagree are not used: %s", tested.excluded)
        return passed

    def available_sizes(self, model: LoadedModel, draft: LoadedModel | None = None) -> CacheSizes:
        try:
            self._steps = {part.config.role: self._allocate_steps(part) for part in (model, draft) if part is not None}
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise out_of_memory(
                "the activations",
                weights=model.weights.nbytes,
                allocated=torch.cuda.memory_reserved(self.device),
                free=free,
                total=total,
                max_num_batched_tokens=model.max_num_batched_tokens,
            ) from error
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_reserved(self.device)
        weights = model.weights.nbytes + (draft.weights.nbytes if draft is not None else 0)
        config = model.config
        plan = MemoryPlan(
            total=total,
            free=free,
            weights=weights,
            activations=max(0, allocated - weights) + quantized_rows_bytes(model) + widened_bytes(model),
            allocated=allocated,
            utilization=config.gpu_memory_utilization,
            draft_block_bytes=draft.block_bytes if draft is not None else 0,
        )
        sizes = cache_sizes(
            plan,
            model.states,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            bytes_per_block=model.block_bytes + plan.draft_block_bytes,
            block_size=model.block_size,
            max_model_len=model.max_model_len,
            shortens=config.max_model_len is None,
        )
        return sizes._replace(num_blocks=self._of_all_ranks(sizes.num_blocks))

    def _of_all_ranks(self, number: int) -> int:
        """The smallest that a rank of the replica has, whose steps must be alike."""
        return number if self._exchange is None else self._exchange.smallest(number)

    def _check_ranks(self) -> None:
        if self._exchange is not None:
            torch.cuda.synchronize(self.device)
            self._exchange.check()

    def make_runner(self, model: LoadedModel, sizes: CacheSizes) -> ModelRunner:
        config = model.config
        steps = self._steps[config.role]  # allocated by available_sizes
        cache, limits = model.allocate_cache(sizes, self.device), model.limits(sizes)
        grammars = model.make_grammar_compiler()
        if isinstance(steps, PoolingMemory):
            return GpuPoolingRunner(steps, cache, grammars, limits, rank=config.rank)
        return GpuModelRunner(steps, cache, grammars, limits, rank=config.rank, graphs=not config.enforce_eager)

    def make_drafter(self, runner: ModelRunner) -> GpuDraftModelRunner:
        assert isinstance(runner, GpuModelRunner)
        return GpuDraftModelRunner(runner.memory, runner.cache, runner.limits, graphs=runner.graphs.enabled)

    def prepare_steps(self, runner: ModelRunner) -> dict[str, str]:
        if runner.pools:
            return {}  # prompts are computed kernel by kernel
        assert isinstance(runner, GpuModelRunner)
        began = perf_counter()
        for context_len in CAPTURED_CONTEXTS:
            runner.capture_decode(CAPTURED_ROWS, context_len)
        torch.cuda.synchronize(self.device)
        logger.info("captured %d graphs in %.2f s", len(runner.graphs), perf_counter() - began)
        return {"graphs": runner.graphs.state}

    def fingerprint(self, model: LoadedModel) -> dict[str, str]:
        return fingerprint_parts(model.weights, model.config.numerics, self.device, self._excluded)

    def memory(self) -> dict[str, int]:
        """On the GPU: used by this process, and in total."""
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "gpu_allocated_bytes": torch.cuda.memory_allocated(self.device),
            "gpu_reserved_bytes": torch.cuda.memory_reserved(self.device),
            "gpu_used_bytes": total - free,
            "gpu_total_bytes": total,
        }

    def end(self) -> None:
        torch.cuda.synchronize(self.device)
        self._steps.clear()
        self._workspaces.clear()
        gc.collect()
        # the library's scratch memory, some of it inside the graphs' pool
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def attention_workspace(self, model: LoadedModel) -> AttentionWorkspace:
        """Memory of attention, shared by all that runs this model."""
        role = model.config.role
        if role not in self._workspaces:
            spec = model.spec
            keys = workspace_len(model.config, model.max_model_len)
            self._workspaces[role] = allocate_attention_workspace(
                spec.num_heads, spec.largest_head_dim, keys, self.device
            )
        return self._workspaces[role]

    def _allocate_steps(self, model: LoadedModel) -> StepMemory | PoolingMemory:
        config, spec, weights = model.config, model.spec, model.weights
        workspace = self.attention_workspace(model)
        scratch = Scratch(
            model.max_num_batched_tokens, model.max_model_len, weights.activations, self.device, workspace
        )
        allocate(model.model, scratch)
        if spec.pooling is not None:
            return PoolingMemory(model.model, _pooler(model))
        rows = max(model.max_num_seqs + config.max_draft_tokens, PROMPT_LOGPROB_ROWS)
        sampler = GpuSampler(
            device=self.device,
            vocab_size=spec.vocab_size,
            max_num_seqs=rows,
            num_slots=model.max_num_seqs,
            reports=reports_of(config.logprobs_mode),
        )
        return StepMemory(
            model.model,
            sampler,
            torch.empty(rows, spec.hidden_size, dtype=weights.activations, device=self.device),
            torch.empty(rows, spec.vocab_size, dtype=torch.float32, device=self.device),
        )


def _pooler(model: LoadedModel) -> Pooler:
    most = model.max_num_seqs
    return Pooler(
        model.model,
        model.weights.activations,
        num_slots=most,
        max_num_seqs=most,
        rank=model.config.rank,
        upload=pinned_upload(model.model.device),
    )


def row_bytes(spec: ModelSpec) -> int:
    """What one more request takes in a step, besides the cache: logits, the sampler's copy of them, a hidden state; or
    the sum that is pooled."""
    if spec.pooling is not None:
        return spec.hidden_size * torch.float64.itemsize
    return 2 * spec.vocab_size * torch.float32.itemsize + spec.hidden_size * torch.float32.itemsize


def widened_bytes(model: LoadedModel) -> int:
    """What a step of many rows allocates for packed weights: the largest, widened, for graphs and for other steps."""
    weights = [linear.weight for _, linear in model.model.linears()]
    sizes = (w.in_features * w.out_features * w.dtype.itemsize for w in weights if isinstance(w, PackedWeight))
    return 2 * max(sizes, default=0)


def quantized_rows_bytes(model: LoadedModel) -> int:
    """What a step allocates for activations in fp8: the rows of the largest matmul's input, and their scales."""
    if model.weights.quantization is not Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        return 0
    largest = max((linear.in_features + 4) * linear.rows_of_token for _, linear in model.model.linears())
    return model.max_num_batched_tokens * largest
