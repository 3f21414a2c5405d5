"""The worker: answers the protocol's commands. No sockets here; the process around it, or the engine in-process, has
them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter

import torch

from sempre.ipc.error_info import describe
from sempre.ipc.errors import ConfigError, ProtocolError
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    ExecuteStep,
    LoadModel,
    ModelLoaded,
    StartServing,
    StepResult,
    WorkerConfig,
    WorkerReady,
)
from sempre.kernels.threads import get_num_threads, set_num_threads
from sempre.workers.fingerprint import fingerprint_parts
from sempre.workers.kv_cache import BLOCK_SIZE, PagedKvCache, available_blocks, block_bytes
from sempre.workers.model_runner import ModelRunner
from sempre.workers.models.decoder import Decoder
from sempre.workers.models.numerics import LinearKernel, linear_kernel
from sempre.workers.models.spec import FLOAT_DTYPES, ModelSpec, load_spec
from sempre.workers.seeding import rng_digests, seed_everything
from sempre.workers.self_test import self_test
from sempre.workers.warm_up import warm_up
from sempre.workers.weights import DecoderWeights, live_digest, load_weights


class Worker:
    """One replica on the CPU. Commands come in the order load_model, start_serving, then execute and call."""

    def __init__(self) -> None:
        self._loaded: _LoadedModel | None = None
        self._runner: ModelRunner | None = None
        self._torch_threads_before = torch.get_num_threads()
        self._methods: dict[str, Callable[..., object]] = {
            "fingerprint": self._fingerprint,
            "kv_cache_digest": self._kv_cache_digest,
            "memory": self._memory,
            "num_threads": get_num_threads,
            "parameter_digest": self._parameter_digest,
            "ping": lambda: "pong",
            "rng_digests": self._rng_digests,
            "self_test": self._self_test,
        }

    def load_model(self, command: LoadModel) -> ModelLoaded:
        """Seed, load, pack and self-test. Raises ConfigError, ModelError or InvarianceError."""
        config = command.config
        _check_config(config)
        seconds: dict[str, float] = {}
        seed_everything(config.seed)
        digests = rng_digests()
        set_num_threads(config.num_threads or max(1, _usable_cores() // config.world_size))
        product = linear_kernel(config.numerics)
        with _timed(seconds, "load_weights"):
            folder = Path(config.model_path)
            spec = load_spec(folder)
            max_model_len = _max_model_len(config, spec)
            weights = load_weights(
                spec, folder, product, dtype=config.dtype, load_format=config.load_format, seed=config.seed
            )
        # torch's own threads would compete with the kernels' for the same cores
        torch.set_num_threads(1)
        loaded = _LoadedModel(config, spec, weights, product, max_model_len)
        if config.numerics == "invariant":
            with _timed(seconds, "self_test"):
                loaded.self_test()
        self._loaded = loaded
        bytes_per_block = block_bytes(spec, config.block_size, weights.dtype)
        return ModelLoaded(
            rank=config.rank,
            digests_before_load=digests,
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            kv_block_bytes=bytes_per_block,
            available_kv_blocks=available_blocks(config, bytes_per_block, max_model_len),
            eos_token_ids=list(spec.eos_token_ids),
            fingerprint=self._fingerprint(),
            phase_seconds=seconds,
        )

    def start_serving(self, command: StartServing) -> WorkerReady:
        """Allocate the KV cache, run every kernel once, seed again."""
        loaded = self._require_loaded()
        config = loaded.config
        seconds: dict[str, float] = {}
        with _timed(seconds, "allocate"):
            cache = PagedKvCache(loaded.spec, command.num_blocks, config.block_size, loaded.weights.dtype)
            decoder = Decoder(
                loaded.spec,
                loaded.weights,
                loaded.product,
                max_tokens=config.max_num_batched_tokens,
                max_model_len=loaded.max_model_len,
            )
            runner = ModelRunner(
                decoder,
                cache,
                max_model_len=loaded.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                rank=config.rank,
            )
        with _timed(seconds, "warm_up"):
            warm_up(runner)
        self._runner = runner
        seed_everything(config.seed)
        return WorkerReady(rank=config.rank, digests_after_warm_up=rng_digests(), phase_seconds=seconds)

    def execute(self, command: ExecuteStep) -> StepResult:
        """One step. A request that cannot be computed carries its error; a step that is wrong raises ProtocolError."""
        sampled = self._require_runner().execute(command)
        return StepResult(rank=self._require_loaded().config.rank, step_id=command.step_id, sampled=sampled)

    def call(self, command: CallMethod) -> CallMethodReply:
        """Call a public method; its error, or that of an unknown name or wrong arguments, is the reply's."""
        rank = self._loaded.config.rank if self._loaded is not None else 0
        try:
            result = self._method(command)(*command.args, **command.kwargs)
        except Exception as error:  # goes to the caller, who asked for this one call
            return CallMethodReply(rank=rank, call_id=command.call_id, error=describe(error, rank))
        return CallMethodReply(rank=rank, call_id=command.call_id, result=result)

    def shutdown(self) -> None:
        """Let go of weights and cache, and give torch its threads back."""
        self._runner = None
        self._loaded = None
        torch.set_num_threads(self._torch_threads_before)

    def _method(self, command: CallMethod) -> Callable[..., object]:
        method = self._methods.get(command.method)
        if method is None:
            near = get_close_matches(command.method, self._methods, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"method: no worker method {command.method!r}.{hint} Known: {', '.join(self._methods)}.",
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

    def _fingerprint(self) -> dict[str, str]:
        loaded = self._require_loaded()
        return fingerprint_parts(loaded.weights, loaded.config.numerics)

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
        """Bytes: resident now and at its peak (of the process), of the weights, and reserved for the KV cache."""
        loaded = self._require_loaded()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
            "weight_bytes": loaded.weights.nbytes,
            "kv_cache_bytes": self._runner.cache.nbytes if self._runner is not None else 0,
        }

    def _parameter_digest(self) -> str:
        return live_digest(self._require_loaded().weights)

    def _rng_digests(self) -> dict[str, str]:
        digests = rng_digests()
        return {name: getattr(digests, name) for name in digests.__struct_fields__}

    def _self_test(self) -> dict[str, int]:
        return self._require_loaded().self_test()

    def _require_loaded(self) -> _LoadedModel:
        if self._loaded is None:
            raise ProtocolError("worker: expected LoadModel as the first command, found another one.")
        return self._loaded

    def _require_runner(self) -> ModelRunner:
        if self._runner is None:
            raise ProtocolError("worker: expected StartServing before this command.")
        return self._runner


class _LoadedModel:
    """What load_model leaves for start_serving."""

    def __init__(
        self,
        config: WorkerConfig,
        spec: ModelSpec,
        weights: DecoderWeights,
        product: LinearKernel,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.spec = spec
        self.weights = weights
        self.product = product
        self.max_model_len = max_model_len

    def self_test(self) -> dict[str, int]:
        return self_test(
            self.spec,
            self.weights,
            self.product,
            block_size=self.config.block_size,
            max_tokens=self.config.max_num_batched_tokens,
        )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[phase] = perf_counter() - start


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_config(config: WorkerConfig) -> None:
    choices: dict[str, tuple[object, tuple[object, ...]]] = {
        "device": (config.device, ("cpu",)),
        "role": (config.role, ("target",)),
        "tp_size": (config.tp_size, (1,)),
        "dtype": (config.dtype, ("auto", *FLOAT_DTYPES)),
        "load_format": (config.load_format, ("auto", "safetensors", "dummy")),
        "block_size": (config.block_size, (BLOCK_SIZE,)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(
                f"{name}: expected {' or '.join(map(repr, allowed))}, found {value!r}.", parameter=name, value=value
            )
    if config.num_threads > _usable_cores():
        raise ConfigError(
            f"num_threads: expected at most the {_usable_cores()} usable cores, found {config.num_threads}.",
            parameter="num_threads",
            value=config.num_threads,
        )


def _max_model_len(config: WorkerConfig, spec: ModelSpec) -> int:
    wanted = config.max_model_len
    if wanted is None:
        return spec.max_position_embeddings
    if not 1 <= wanted <= spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: expected 1 to {spec.max_position_embeddings} (max_position_embeddings of the model),"
            f" found {wanted}.",
            parameter="max_model_len",
            value=wanted,
        )
    return wanted
