"""Compiles and loads the kernels of a model while its weights are being loaded.

Which variants a model needs is not listed anywhere: the launching code runs on a reduced model, with one layer of each
kind, and its launches are only recorded; an index keeps them for later starts. Variants missing from the cache folder
are compiled in many processes in parallel. Whatever a step still lacks is compiled on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replace_fields
from itertools import product as combinations
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

import torch
from msgspec.structs import replace

from sempre.kernels.attention import AttentionWorkspace, PagedBatch
from sempre.kernels.attention.gpu import allocate_attention_workspace
from sempre.kernels.attention.gpu_tiles import SPLIT
from sempre.kernels.gpu_jit import Collection, Variant, collecting
from sempre.kernels.packed import can_unpack
from sempre.kernels.pooling import RowSpans, add_rows
from sempre.kernels.sampling import Reports, gpu_table
from sempre.kernels.sampling import gpu as gpu_sampling
from sempre.kernels.states import StateBatch
from sempre.workers.adapters.store import AdapterStore
from sempre.workers.backend import ModelSetup
from sempre.workers.gpu.compiler_process import CompilerProcess
from sempre.workers.gpu.decode_graphs import DecodeShape
from sempre.workers.gpu.kernel_cache_index import index_key, read_index, write_index
from sempre.workers.gpu.runner import GpuModelRunner, StepMemory
from sempre.workers.gpu.self_test import run_self_test
from sempre.workers.gpu.shared_splits import workspace_len
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, Scratch, allocate, parameters
from sempre.workers.loading import Placement, WeightFacts, load_model
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.registry import build_model
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.sampling import GrammarCompiler, reports_of
from sempre.workers.sampling.gpu_sampler import GpuSampler
from sempre.workers.state_cache import StateCache
from sempre.workers.step_validation import StepLimits
from sempre.workers.steps import StepInput, step_adapters

# this few kernels compile faster here than a compiler process starts
FEW = 4
# what the reduced model, its scratch memory and the self-test take at most, without logits
COLLECTION_BYTES = 8 << 30
MAX_TOKENS = 1024
# requests, tokens of each, context of each: tiles of every size, in one split, in parallel splits, and in turn
PROMPTS = (
    (1, 2, 64), (1, 2, 4096), (1, 16, 64), (1, 16, 4096), (1, 256, 512), (1, 256, 4096), (64, 8, 64), (64, 8, 4096),
)  # fmt: skip
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DECODE_CONTEXTS = (64, 1024, 4096, 1 << 30)


class KernelCompilation:
    """Runs in the background from `__enter__` to `finish`."""

    def __init__(self, setup: ModelSetup, device: torch.device, compiler: CompilerProcess | None) -> None:
        """`compiler`, if one was started early, is used up."""
        self._setup = setup
        self._device = device
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compilation")

    def __enter__(self) -> Self:
        self._done = self._thread.submit(_prepare, self._setup, self._device, self._compiler)
        return self

    def finish(self) -> dict[str, float]:
        return self._done.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of all tensors when stored as `dtype`; fp8 takes less."""
    model = build_model(Build(INVARIANT, NotQuantized()), spec)
    size = sum(math.prod(parameter.shape) for parameter in parameters(model).values())
    return size * (torch.float32.itemsize if dtype == "float32" else torch.bfloat16.itemsize)


def _most_rows(setup: ModelSetup) -> int:
    """The most rows of a decode step for which kernels differ."""
    return min(max(setup.max_num_seqs, 256), DECODE_ROWS[-1])


def _has_room(setup: ModelSetup, device: torch.device) -> bool:
    """Whether the weights leave memory for this; else kernels are compiled when they first run."""
    scratch = COLLECTION_BYTES + _most_rows(setup) * 2 * torch.float32.itemsize * setup.spec.vocab_size
    return weight_bytes(setup.spec, setup.config.dtype) + scratch < torch.cuda.mem_get_info(device)[0]


def _prepare(setup: ModelSetup, device: torch.device, compiler: CompilerProcess | None) -> dict[str, float]:
    """Returns the seconds of each phase."""
    torch.cuda.set_device(device)
    began = perf_counter()
    key = index_key(setup, f"{torch.cuda.get_device_name(device)} {_capability(device)}")
    recorded = read_index(key)
    collects = recorded is None and _has_room(setup, device)
    if compiler is not None and not collects:
        compiler.close()
        compiler = None
    collection = collect(setup, device, compiler) if collects else Collection(recorded or [])
    collected = perf_counter()
    _compile(collection.variants, device, compiler)
    compiled = perf_counter()
    for variant in collection.variants:
        variant.load()
    if collects and collection.complete:
        write_index(key, collection.variants)
    return {
        "collect_kernels": collected - began,
        "compile_kernels": compiled - collected,
        "load_kernels": perf_counter() - compiled,
    }


def collect(setup: ModelSetup, device: torch.device, compiler: CompilerProcess | None) -> Collection:
    """The kernel variants that a model's steps and self-test use; `compiler`, if any, gets each as it is found."""
    if compiler is None:
        return _launch_all(setup, device, lambda variant: None)
    compiler.start(_capability(device))
    return _launch_all(setup, device, lambda variant: compiler.add(variant.describe()))


def _compile(variants: Sequence[Variant], device: torch.device, compiler: CompilerProcess | None) -> None:
    """Compile those missing from the cache folder; a given compiler has them all already."""
    if compiler is None:
        missing = [variant.describe() for variant in variants if not variant.is_on_disk()]
        if len(missing) <= FEW:
            return
        compiler = CompilerProcess()
        compiler.start(_capability(device))
        for description in missing:
            compiler.add(description)
    compiler.finish()


def _capability(device: torch.device) -> int:
    """90 for 9.0"""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.inference_mode()
def _launch_all(setup: ModelSetup, device: torch.device, found: Callable[[Variant], object]) -> Collection:
    spec, config = setup.spec.one_layer_per_kind(), setup.config
    placement = Placement(device, lambda tensor: tensor, hashing_threads=1, packs=can_unpack(device))
    dummy = replace(config, load_format="dummy", seed=0)
    model, facts = load_model(dummy, spec, setup.kernel, placement, setup.parallel)
    keys = workspace_len(config, setup.max_model_len)
    workspace = allocate_attention_workspace(spec.num_heads, spec.largest_head_dim, keys, device)
    if config.num_adapter_slots:
        AdapterStore(config, model, facts.activations)  # gives the layers their slots
    with collecting(found) as collection:
        _launch_steps(setup, model, facts, workspace, device)
        if spec.pooling is None:
            _launch_reports(spec.vocab_size, device, reports_of(config.logprobs_mode))
        if config.numerics == "invariant":
            run_self_test(
                model,
                facts,
                workspace,
                block_size=setup.block_size,
                max_tokens=setup.max_num_batched_tokens,
                max_num_seqs=setup.max_num_seqs,
            )
    return collection


def _launch_steps(
    setup: ModelSetup,
    model: CausalLM,
    facts: WeightFacts,
    workspace: AttentionWorkspace,
    device: torch.device,
) -> None:
    """Each combination of the stages of sampling, prompts of several sizes, and decode steps of every bucket."""
    spec, config = model.spec, setup.config
    allocate(model, Scratch(MAX_TOKENS, setup.max_model_len, facts.activations, device, workspace))
    most_rows = _most_rows(setup)
    states = StateCache(spec.layer_states, 1, facts.activations, device)
    cache = PagedKvCache(model.kv_layers, 1, setup.block_size, facts.kv_dtype, device, states)
    _launch_prompts(setup, model, cache, device)
    if spec.pooling is not None:
        _launch_pooling(model, facts, most_rows)
        return
    sampler = GpuSampler(
        device=device,
        vocab_size=spec.vocab_size,
        max_num_seqs=most_rows,
        num_slots=most_rows,
        reports=reports_of(config.logprobs_mode),
    )
    memory = StepMemory(
        model,
        sampler,
        torch.empty(most_rows, spec.hidden_size, dtype=facts.activations, device=device),
        torch.empty(most_rows, spec.vocab_size, dtype=torch.float32, device=device),
    )
    limits = StepLimits(
        setup.max_model_len,
        most_rows,
        MAX_TOKENS,
        spec.vocab_size,
        num_state_slots=1 if any(spec.layer_states) else 0,
        num_adapter_slots=config.num_adapter_slots,
    )
    runner = GpuModelRunner(
        memory, cache, GrammarCompiler(Path(config.model_path), spec.vocab_size), limits, rank=config.rank, graphs=False
    )
    # slowest to compile first
    for edits, truncates, num_best in combinations((True, False), (True, False), (-1, 0, 5, 20)):
        stages = gpu_sampling.Stages(edits=edits, truncates=truncates, num_best=num_best)
        runner.launch_decode(DecodeShape(1, min(64, setup.max_model_len), stages))
    plain = gpu_sampling.Stages(edits=False, truncates=False, num_best=-1)
    decode_rows = [rows for rows in DECODE_ROWS if rows <= most_rows]
    for rows, context in combinations(decode_rows, DECODE_CONTEXTS):
        length = min(context, setup.max_model_len)
        for has_adapters in (False, True)[: 1 + (config.num_adapter_slots > 0)]:
            runner.launch_decode(DecodeShape(rows, length, plain, has_adapters=has_adapters))
        if config.enable_prefix_caching and length > SPLIT:
            runner.launch_decode(DecodeShape(rows, length, plain, shares_prefixes=True))


def _launch_prompts(setup: ModelSetup, model: CausalLM, cache: PagedKvCache, device: torch.device) -> None:
    width = -(-setup.max_model_len // setup.block_size)
    for requests, tokens, context in PROMPTS:
        if context <= setup.max_model_len:
            step = _prompts(requests, tokens, context, width, device)
            if not any(model.spec.layer_states):
                step = replace_fields(step, states=None)
            model.forward(step, cache.layers)
            if setup.config.num_adapter_slots:
                slots = torch.zeros(requests * tokens, dtype=torch.int32, device=device)
                model.forward(replace_fields(step, adapters=step_adapters(slots, None)), cache.layers)


def _launch_pooling(model: CausalLM, facts: WeightFacts, most_rows: int) -> None:
    """Sums of rows, and a score head for as many requests as it has kernels for."""
    width, device = model.spec.hidden_size, model.device
    ones = torch.ones(1, dtype=torch.int64, device=device)
    hidden = torch.zeros(2, width, dtype=facts.activations, device=device)
    add_rows(
        hidden, RowSpans(ones, ones + 1, ones - 1, ones), torch.zeros(1, width, dtype=torch.float64, device=device)
    )
    if model.score is None:
        return
    for rows in DECODE_ROWS:
        if rows <= most_rows:
            out = torch.empty(rows, model.score.out_features, dtype=torch.float32, device=device)
            model.scores(torch.zeros(rows, width, dtype=facts.activations, device=device), out)


def _prompts(requests: int, tokens: int, context: int, width: int, device: torch.device) -> StepInput:
    """The contents do not matter: nothing is launched."""
    total = requests * tokens
    query_starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    return StepInput(
        token_ids=torch.zeros(total, dtype=torch.int64, device=device),
        positions=torch.zeros(total, dtype=torch.int64, device=device),
        slot_mapping=torch.zeros(total, dtype=torch.int64, device=device),
        batch=PagedBatch(
            block_tables=torch.zeros(requests, width, dtype=torch.int32, device=device),
            query_starts=query_starts,
            context_lens=torch.zeros(requests, dtype=torch.int32, device=device),
            max_query_len=tokens,
            max_context_len=context,
        ),
        states=StateBatch(
            reads=torch.zeros(requests, dtype=torch.int32, device=device),
            writes=torch.zeros(total, dtype=torch.int32, device=device),
            query_starts=query_starts,
        ),
    )


def _launch_reports(vocab_size: int, device: torch.device, reports: Reports) -> None:
    """Log-probabilities of prompts, for every number of best tokens."""
    buffers = gpu_sampling.SamplingBuffers(device, vocab_size, 1, reports=reports)
    logits = torch.empty(1, vocab_size, dtype=torch.float32, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    table = gpu_table.empty_table(1, device)
    for num_best in range(gpu_sampling.MAX_BEST + 1):
        gpu_sampling.report_logprobs(logits, targets, slots, table, buffers, num_best)
