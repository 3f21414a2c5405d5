"""The worker: answers the protocol's commands. No sockets here; they belong to the surrounding process, or the
in-process engine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter

from msgspec.structs import replace

from sempre.ipc.config import BLOCK_SIZES, check_device_settings
from sempre.ipc.error_info import describe
from sempre.ipc.errors import ConfigError, ProtocolError
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    ExecuteStep,
    LoadModel,
    ModelLoaded,
    StartServing,
    StepCosts,
    StepResult,
    WorkerConfig,
    WorkerReady,
)
from sempre.kernels.threads import get_num_threads
from sempre.workers.adapters.store import AdapterStore, adapter_methods
from sempre.workers.backend import Backend, LoadedModel, ModelSetup
from sempre.workers.backends import make_backend
from sempre.workers.device import attention_parity, resolve_device
from sempre.workers.drafters.base import check_drafts
from sempre.workers.drafters.model import DraftSteps, ModelDrafter
from sempre.workers.fingerprint import setting_parts
from sempre.workers.gpu.compiler_process import CompilerProcess
from sempre.workers.layers.linear_kernel import linear_kernel
from sempre.workers.live_weights import weight_methods
from sempre.workers.loading import live_digest, load_model
from sempre.workers.model_length import fitted, max_model_len
from sempre.workers.models.config import spec_digest
from sempre.workers.models.pooling import PoolingSettings
from sempre.workers.models.registry import load_spec
from sempre.workers.module_trace import TracedResult, trace_methods, trace_modules
from sempre.workers.replica import join_replica, whole_model
from sempre.workers.runner import ModelRunner, StepQueue
from sempre.workers.sampling.grammar import grammar_library_version
from sempre.workers.seeding import rng_digests, seed_everything
from sempre.workers.state_cache import CacheSizes
from sempre.workers.warm_up import warm_up

logger = logging.getLogger(__name__)


class Worker:
    """One replica on one device. Commands come in the order load_model, start_serving, then steps and calls."""

    def __init__(
        self,
        compiler: CompilerProcess | None = None,
        *,
        import_seconds: float = 0.0,
        shared_memory: int | None = None,
    ) -> None:
        """`compiler` was started early, for a GPU. `import_seconds` is how long the imports took, for the report.
        `shared_memory` is a file descriptor, given where other ranks share the replica."""
        self._shared_memory = shared_memory
        self._compiler = compiler
        self._import_seconds = import_seconds
        self._backend: Backend | None = None
        self._loaded: LoadedModel | None = None
        self._runner: ModelRunner | None = None
        self._steps: StepQueue | None = None
        self._draft_model: LoadedModel | None = None
        self._drafter: ModelDrafter | None = None
        self._late_fingerprint: dict[str, str] = {}
        self._methods: dict[str, Callable[..., object]] = {
            "fingerprint": self._fingerprint,
            "kv_cache_digest": self._kv_cache_digest,
            "memory": self._memory,
            "num_threads": get_num_threads,
            "parameter_digest": self._parameter_digest,
            "ping": lambda: "pong",
            "rng_digests": self._rng_digests,
            "self_test": self._self_test,
            **trace_methods(self._trace),
            **weight_methods(self._require_loaded, lambda: self._require_backend().placement, self._take_weights),
            **adapter_methods(lambda: self._require_loaded().adapters),
        }

    def load_model(self, command: LoadModel) -> ModelLoaded:
        """Seed, load, pack and self-test. Raises ConfigError, ModelError or InvarianceError."""
        seconds = {"imports": self._import_seconds}
        backend = make_backend(resolve_device(command.config.device, command.config.device_index), self._compiler)
        config = command.config
        check_device_settings(config, backend.placement.device.type)
        seed_everything(config.seed)
        digests = rng_digests()
        with _timed(seconds, "start_device"):
            backend.begin(config)
        self._backend = backend
        parallel = join_replica(config, backend, self._shared_memory)
        setup = replace_fields(_setup(config, backend), parallel=parallel)
        with backend.loading(setup) as compilation:
            with _timed(seconds, "load_weights"):
                loaded = _load(setup, backend)
                self._draft_model = _load_draft_model(loaded, backend)
            with _timed(seconds, "compile"):
                seconds |= compilation.finish()
        if config.numerics == "invariant":
            with _timed(seconds, "self_test"):
                backend.self_test(loaded)
        sizes = backend.available_sizes(loaded, self._draft_model)
        loaded = self._loaded = fitted(loaded, sizes.num_blocks)
        pooling = loaded.spec.pooling
        return ModelLoaded(
            rank=config.rank,
            digests_before_load=digests,
            vocab_size=loaded.spec.vocab_size,
            max_model_len=loaded.max_model_len,
            kv_block_bytes=loaded.block_bytes,
            available_kv_blocks=sizes.num_blocks,
            costs=self._expected_costs(loaded),
            eos_token_ids=list(loaded.spec.eos_token_ids),
            fingerprint=self._fingerprint(),
            phase_seconds=seconds,
            max_steps_in_flight=backend.max_steps_in_flight,
            block_size=loaded.block_size,
            max_num_batched_tokens=loaded.max_num_batched_tokens,
            max_prompt_tokens=backend.max_prompt_tokens,
            step_lead_s=backend.step_lead_s,
            max_num_seqs=loaded.max_num_seqs,
            available_state_slots=sizes.num_state_slots,
            state_slot_bytes=loaded.states.slot_bytes,
            pooling=None if pooling is None else pooling.facts(loaded.spec.hidden_size),
            attention_parity=None if backend.max_prompt_tokens is None else attention_parity(whole_model(loaded)),
        )

    def start_serving(self, command: StartServing) -> WorkerReady:
        """Allocate the KV cache, run every kernel once, seed again."""
        loaded, backend = self._require_loaded(), self._require_backend()
        config = loaded.config
        seconds: dict[str, float] = {}
        with _timed(seconds, "allocate"):
            runner = backend.make_runner(loaded, CacheSizes(command.num_blocks, command.num_state_slots))
            runner.adapters = loaded.adapters
            draft_runner = self._make_draft_runner(runner, command.num_blocks)
        with _timed(seconds, "warm_up"):
            warm_up(runner)
            if draft_runner is not None and draft_runner is not runner:
                warm_up(draft_runner)
        with _timed(seconds, "prepare_steps"):
            if draft_runner is not runner:
                self._late_fingerprint = backend.prepare_steps(runner)
            if draft_runner is not None:
                drafts = backend.make_drafter(draft_runner)
                drafts.prepare()
                self._drafter = ModelDrafter(drafts, max_num_seqs=loaded.max_num_seqs)
        self._runner = runner
        # only its drafter runs the model of a draft worker
        self._steps = DraftSteps() if config.role == "draft" else runner
        seed_everything(config.seed)
        return WorkerReady(
            rank=config.rank,
            digests_after_warm_up=rng_digests(),
            phase_seconds=seconds,
            fingerprint=self._late_fingerprint,
        )

    @property
    def steps_in_flight(self) -> int:
        """Steps submitted and not collected."""
        return 0 if self._steps is None else self._steps.steps_in_flight

    def submit(self, command: ExecuteStep) -> None:
        """Start a step without waiting for an asynchronous device. A request that cannot be computed has its error in
        the result. Raises ProtocolError for a step that is wrong."""
        steps = self._require_steps()
        loaded = self._require_loaded()
        drafts = self._drafter is not None or not loaded.parallel.stage.is_last
        check_drafts(command, loaded.config.role, drafts=drafts)
        steps.submit(command)

    def step_done(self) -> bool:
        """Whether the oldest step in flight is done."""
        return self._require_steps().step_done()

    def collect(self) -> StepResult:
        """Wait for that step; its result."""
        step, sampled = self._require_steps().collect()
        drafts: list[list[int]] = []
        if self._drafter is not None:
            self._drafter.observe(step, sampled)
            drafts = self._drafter.propose(step.drafts)
        rank = self._require_loaded().config.rank
        return StepResult(rank=rank, step_id=step.step_id, sampled=sampled, drafts=drafts)

    def call(self, command: CallMethod) -> CallMethodReply:
        """Call a public method; its error, or that of an unknown name or wrong arguments, is the reply's."""
        rank = self._loaded.config.rank if self._loaded is not None else 0
        try:
            result = self._method(command)(*command.args, **command.kwargs)
        except Exception as error:  # goes to the caller of this one method
            return CallMethodReply(rank=rank, call_id=command.call_id, error=describe(error, rank))
        return CallMethodReply(rank=rank, call_id=command.call_id, result=result)

    def shutdown(self) -> None:
        """Release weights, cache, and what the device's backend acquired."""
        self._runner = None
        self._steps = None
        self._loaded = None
        self._draft_model = None
        self._drafter = None
        if self._backend is not None:
            self._backend.end()
            self._backend = None
        if self._compiler is not None:
            self._compiler.close()

    def _make_draft_runner(self, runner: ModelRunner, num_blocks: int) -> ModelRunner | None:
        """The runner that drafts: a draft worker's model, or a target worker's second model, with as many blocks."""
        if self._require_loaded().config.role == "draft":
            return runner
        if self._draft_model is None:
            return None
        return self._require_backend().make_runner(self._draft_model, CacheSizes(num_blocks))

    def _method(self, command: CallMethod) -> Callable[..., object]:
        method = self._methods.get(command.method)
        if method is None:
            known = [name for name in self._methods if not name.startswith("_")]
            near = get_close_matches(command.method, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"method: no worker method {command.method!r}.{hint} Known: {', '.join(known)}.",
                parameter="method",
                value=command.method,
            )
        signature = inspect.signature(method)
        try:
            signature.bind(*command.args, **command.kwargs)
        except TypeError as error:
            raise ConfigError(
                f"{command.method}: expected arguments {signature}: {error}.",
                parameter="args",
                value=repr((command.args, command.kwargs)),
            ) from error
        return method

    def _expected_costs(self, loaded: LoadedModel) -> StepCosts:
        speed, draft = self._require_backend().speed, self._draft_model
        draft_seconds = 0.0 if draft is None else speed.decode_seconds(draft.spec, draft.weights)
        return speed.costs(speed.decode_seconds(loaded.spec, loaded.weights), draft_seconds)

    def _fingerprint(self) -> dict[str, str]:
        loaded = self._require_loaded()
        parts = self._require_backend().fingerprint(loaded)
        own = {"config": spec_digest(loaded.spec, loaded.max_model_len), "llguidance": grammar_library_version()}
        return parts | own | setting_parts(loaded.config) | self._late_fingerprint

    def _kv_cache_digest(self, block_ids: list[int]) -> str:
        cache = self._require_runner().cache
        for block_id in block_ids:
            if type(block_id) is not int or not 0 <= block_id < cache.num_blocks:
                raise ConfigError(
                    f"block_ids: expected ids in [0, {cache.num_blocks}), found {block_id!r}.",
                    parameter="block_ids",
                    value=block_id,
                )
        return cache.digest(block_ids)

    def _memory(self) -> dict[str, int]:
        """Bytes: as counted by the device's backend, of the weights, and of the KV caches of model and draft."""
        cache = None if self._runner is None else self._runner.cache
        draft_block = 0 if self._draft_model is None else self._draft_model.block_bytes
        return self._require_backend().memory() | {
            "weight_bytes": self._require_loaded().weights.nbytes,
            "kv_cache_bytes": 0 if cache is None else cache.nbytes,
            "state_cache_bytes": 0 if cache is None or cache.states is None else cache.states.nbytes,
            "draft_kv_cache_bytes": 0 if cache is None else cache.num_blocks * draft_block,
        }

    def _parameter_digest(self) -> str:
        return live_digest(self._require_loaded().model)

    def _rng_digests(self) -> dict[str, str]:
        digests = rng_digests()
        return {name: getattr(digests, name) for name in digests.__struct_fields__}

    def _self_test(self) -> dict[str, int]:
        return self._require_backend().self_test(self._require_loaded())

    def _take_weights(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def _trace(self, token_ids: list[int]) -> list[TracedResult]:
        loaded = self._require_loaded()
        workspace = self._require_backend().attention_workspace(loaded)
        return trace_modules(loaded.model, loaded.weights, token_ids, block_size=loaded.block_size, workspace=workspace)

    def _require_backend(self) -> Backend:
        self._require_loaded()
        assert self._backend is not None
        return self._backend

    def _require_loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise ProtocolError("worker: expected LoadModel as the first command, found another one.")
        return self._loaded

    def _require_steps(self) -> StepQueue:
        self._require_runner()
        assert self._steps is not None
        return self._steps

    def _require_runner(self) -> ModelRunner:
        if self._runner is None:
            raise ProtocolError("worker: expected StartServing before this command.")
        return self._runner


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[phase] = perf_counter() - start


def _setup(config: WorkerConfig, backend: Backend) -> ModelSetup:
    is_draft = config.role == "draft"
    settings = PoolingSettings(*(("generate",) if is_draft else (config.runner, config.convert, config.pooler_config)))
    spec = load_spec(Path(config.model_path), settings)
    if spec.pooling is not None and config.speculative_config is not None:
        raise ConfigError(
            "speculative_config: nothing is drafted for a model that pools. Leave it out.",
            parameter="speculative_config",
        )
    if spec.pooling is not None and config.enable_lora:
        raise ConfigError("enable_lora: a model that pools has no adapters. Leave it out.", parameter="enable_lora")
    if is_draft and any(spec.layer_states):
        raise ConfigError(
            f"speculative_config: the draft model {config.model_path} ({spec.architecture}) has layers that keep"
            " states; expected one whose layers all have attention. Choose another draft model, or method ngram or"
            " suffix.",
            parameter="speculative_config",
            value=config.model_path,
        )
    return ModelSetup(
        config,
        spec,
        linear_kernel(config.numerics),
        max_model_len=max_model_len(config, spec),
        block_size=config.block_size or BLOCK_SIZES[backend.placement.device.type][0],
        max_num_batched_tokens=config.max_num_batched_tokens or backend.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs or backend.default_max_num_seqs(config, spec),
    )


def _load(setup: ModelSetup, backend: Backend) -> LoadedModel:
    model, weights = load_model(setup.config, setup.spec, setup.kernel, backend.placement, setup.parallel)
    serves_adapters = setup.config.enable_lora and setup.config.role == "target"
    adapters = AdapterStore(setup.config, model, weights.activations) if serves_adapters else None
    return LoadedModel(**vars(setup), model=model, weights=weights, adapters=adapters)


def _load_draft_model(target: LoadedModel, backend: Backend) -> LoadedModel | None:
    """The model that a target's worker drafts with, if any; only the last stage does."""
    config = target.config
    folder = config.colocated_draft_model
    if folder is None or not target.parallel.stage.is_last:
        return None
    draft_config = replace(
        config,
        role="draft",
        model_path=folder,
        weights_path=None,
        speculative_config=None,
        quantization=None,
        numerics_profile="single",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        max_model_len=target.max_model_len,
    )
    draft = _load(_setup(draft_config, backend), backend)
    found, expected = draft.spec.vocab_size, target.spec.vocab_size
    if found != expected:
        raise ConfigError(
            f"speculative_config: the draft model {folder} has a vocabulary of {found} tokens, and the"
            f" model {config.model_path} one of {expected}; both must have the same tokens.",
            parameter="speculative_config",
            value=folder,
        )
    return draft
