"""The worker: answers the protocol's commands. No sockets here; they belong to the surrounding process, or the
in-process engine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace as replace_fields
from difflib import get_close_matches

from msgspec.structs import asdict

from sempre.ipc.config import check_device_settings
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
    WorkerReady,
)
from sempre.ipc.rank_links import RankLinks
from sempre.kernels.threads import get_num_threads
from sempre.workers.adapters.store import adapter_methods
from sempre.workers.backend import Backend, LoadedModel
from sempre.workers.backends import make_backend
from sempre.workers.device import attention_parity, resolve_device
from sempre.workers.drafters.base import check_drafts
from sempre.workers.drafters.model import DraftSteps, ModelDrafter
from sempre.workers.fingerprint import setting_parts
from sempre.workers.gpu.compiler_process import CompilerProcess
from sempre.workers.inspection import checked_digest, memory_bytes
from sempre.workers.live_weights import weight_methods
from sempre.workers.loading import live_digest
from sempre.workers.model_length import fitted
from sempre.workers.model_loading import load_draft_model, load_with_adapters, model_setup
from sempre.workers.models.config import spec_digest
from sempre.workers.module_trace import TracedResult, trace_methods, trace_modules
from sempre.workers.phases import timed
from sempre.workers.reference_trace import compare_methods
from sempre.workers.replica import join_replica, whole_model
from sempre.workers.runner import ModelRunner, StepQueue
from sempre.workers.sampling.grammar import grammar_library_version
from sempre.workers.seeding import rng_digests, seed_everything
from sempre.workers.sleep import SleepingModel, asleep, check_device, give_back
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
        links: RankLinks | None = None,
    ) -> None:
        """`compiler` was started early, for a GPU. `import_seconds` is how long the imports took, for the report.
        Where other ranks share the replica, `shared_memory` is a file descriptor, and `links` go to other hosts."""
        self._shared_memory, self._links = shared_memory, links
        self._compiler = compiler
        self._import_seconds = import_seconds
        self._backend: Backend | None = None
        self._loaded: LoadedModel | None = None
        self._runner: ModelRunner | None = None
        self._steps: StepQueue | None = None
        self._draft_model: LoadedModel | None = None
        self._drafter: ModelDrafter | None = None
        self._late_fingerprint: dict[str, str] = {}
        self._rank = 0
        self._sleeping: SleepingModel | None = None
        """set while caches, or also weights, are released"""
        self._methods: dict[str, Callable[..., object]] = {
            "fingerprint": self._fingerprint,
            "kv_cache_digest": self._kv_cache_digest,
            "memory": self._memory,
            "num_threads": get_num_threads,
            "parameter_digest": self._parameter_digest,
            "ping": lambda: "pong",
            "rng_digests": lambda: asdict(rng_digests()),
            "self_test": self._self_test,
            "_release": self._release,
            "_restore": self._restore,
            **trace_methods(self._trace, lambda: self._require_loaded().config.rank),
            **compare_methods(self._trace),
            **weight_methods(self._require_loaded, lambda: self._require_backend().placement, self._take_weights),
            **adapter_methods(lambda: self._require_loaded().adapters),
        }

    def load_model(self, command: LoadModel) -> ModelLoaded:
        """Seed, load, pack and self-test. Raises ConfigError, ModelError or InvarianceError."""
        seconds = {"imports": self._import_seconds}
        backend = make_backend(resolve_device(command.config.device, command.config.device_index), self._compiler)
        config = command.config
        self._rank = config.rank
        check_device_settings(config, backend.placement.device.type)
        seed_everything(config.seed)
        digests = rng_digests()
        with timed(seconds, "start_device"):
            backend.begin(config)
        self._backend = backend
        links = self._links and self._links.connect(command.addresses)
        parallel = join_replica(config, backend, self._shared_memory, links)
        setup = replace_fields(model_setup(config, backend), parallel=parallel)
        with backend.loading(setup) as compilation:
            with timed(seconds, "load_weights"):
                loaded = load_with_adapters(setup, backend)
                self._draft_model = load_draft_model(loaded, backend)
            with timed(seconds, "compile"):
                seconds |= compilation.finish()
        if config.numerics == "invariant":
            with timed(seconds, "self_test"):
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
        with timed(seconds, "allocate"):
            runner = backend.make_runner(loaded, CacheSizes(command.num_blocks, command.num_state_slots))
            runner.adapters = loaded.adapters
            draft_runner = self._make_draft_runner(runner, command.num_blocks)
        with timed(seconds, "warm_up"):
            warm_up(runner)
            if draft_runner is not None and draft_runner is not runner:
                warm_up(draft_runner)
        with timed(seconds, "prepare_steps"):
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
        try:
            result = self._method(command)(*command.args, **command.kwargs)
        except Exception as error:  # goes to the caller of this one method
            return CallMethodReply(rank=self._rank, call_id=command.call_id, error=describe(error, self._rank))
        return CallMethodReply(rank=self._rank, call_id=command.call_id, result=result)

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
        sizes = CacheSizes(num_blocks, self._draft_model.states.num_own)
        return self._require_backend().make_runner(self._draft_model, sizes)

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
        return checked_digest(self._require_runner().cache, block_ids)

    def _memory(self) -> dict[str, int]:
        """Bytes: as counted by the device's backend, of the weights, and of the KV caches of model and draft."""
        if self._sleeping is None:
            self._require_loaded()
        assert self._backend is not None
        cache = None if self._runner is None else self._runner.cache
        return self._backend.memory() | memory_bytes(self._loaded, self._draft_model, cache)

    def _parameter_digest(self) -> str:
        return live_digest(self._require_loaded().model)

    def _release(self, tags: list[str]) -> None:
        """Give back the caches, and the weights if `tags` has them, until `_restore`. Raises ConfigError on a GPU."""
        assert self._backend is not None
        check_device(self._backend.placement.device)
        if self._loaded is not None:
            self._sleeping = SleepingModel.of(self._loaded)
        self._runner = self._steps = self._drafter = None
        if "weights" in tags:
            self._loaded = self._draft_model = None
        give_back()

    def _restore(self, tags: list[str], weights_path: str | None, num_blocks: int, num_state_slots: int) -> None:
        """Read weights and allocate caches again, whatever of `tags` is missing. Raises ModelError for other weights
        than before, and the errors of loading."""
        sleeping, backend = self._sleeping, self._backend
        if sleeping is None:
            return
        assert backend is not None
        if "weights" in tags and self._loaded is None:
            loaded = load_with_adapters(sleeping.setup(weights_path), backend)
            sleeping.check(loaded)
            self._draft_model = load_draft_model(loaded, backend)
            self._loaded = loaded
        if "kv_cache" in tags:
            self.start_serving(StartServing(num_blocks=num_blocks, num_state_slots=num_state_slots))
            self._sleeping = None

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
            if self._sleeping is not None:
                raise asleep("weights")
            raise ProtocolError("worker: expected LoadModel as the first command, found another one.")
        return self._loaded

    def _require_steps(self) -> StepQueue:
        self._require_runner()
        assert self._steps is not None
        return self._steps

    def _require_runner(self) -> ModelRunner:
        if self._runner is None:
            if self._sleeping is not None:
                raise asleep("caches")
            raise ProtocolError("worker: expected StartServing before this command.")
        return self._runner
