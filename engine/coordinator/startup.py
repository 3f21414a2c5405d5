"""Brings the workers of an engine from connected to serving, in two phases, and checks that their seeds agree.

    WorkerHello → LoadModel → ModelLoaded      all ranks: digests before load, limits, fingerprint compared
                → StartServing → WorkerReady   all ranks: digests after warm-up compared

Each worker progresses independently within a phase; a phase ends when its last worker has answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from sempre.engine.executor.base import Executor, draft_ranks, worker_config, worker_name
from sempre.engine.executor.threads import threads_per_worker
from sempre.engine.seeding import compare_digests, compare_with_former
from sempre.ipc.config import EngineConfig, with_weights
from sempre.ipc.errors import ConfigError, StartupError
from sempre.ipc.messages import (
    EngineReady,
    LoadModel,
    ModelLoaded,
    StartServing,
    StartupProgress,
    StepCosts,
    WorkerConfig,
    WorkerEvent,
    WorkerHello,
    WorkerReady,
)

_ALIKE = (
    "vocab_size",
    "eos_token_ids",
    "fingerprint",
    "max_steps_in_flight",
    "block_size",
    "max_num_batched_tokens",
    "max_prompt_tokens",
    "pooling",
    "attention_parity",
)

# of the layers of a stage
_ALIKE_IN_STAGE = ("kv_block_bytes", "state_slot_bytes")

# derived from a worker's memory; the minimum applies to all
_CHOSEN = ("max_model_len", "max_num_seqs")


class StartUp:
    """Handles the workers' events; the last one sets `ready`."""

    def __init__(self, config: EngineConfig, executor: Executor, ranks: range) -> None:
        """`ranks`: the workers to start, all targets or all draft workers."""
        self.ready: EngineReady | None = None
        self._ranks = ranks
        drafts = draft_ranks(config)
        self._names = {rank: worker_name(config, rank) if rank in drafts else f"rank {rank}" for rank in ranks}
        self._config = config
        self._executor = executor
        # a draft worker has a whole model
        self._replica_size = 1 if ranks.start in drafts else config.replica_size
        self._stage_size = 1 if ranks.start in drafts else config.tensor_parallel_size
        self._num_threads = threads_per_worker(config.num_threads, config.ranks_per_node)
        self.pids: dict[int, int] = {}
        self._absent: set[int] = set()
        self._loaded: dict[int, ModelLoaded] = {}
        self._warm: dict[int, WorkerReady] = {}
        self._phase_began = time.monotonic()
        self._phase_seconds: dict[str, float] = {}

    def handle(self, rank: int, event: WorkerEvent) -> list[StartupProgress]:
        """Return the progress from an event. Raises SeedMismatch, or StartupError if the workers differ."""
        size = len(self._ranks)
        match event:
            case WorkerHello(pid=pid):
                self.pids[rank] = pid
                config = worker_config(self._config, rank, self._num_threads)
                self._executor.send(rank, LoadModel(config=config))
                return self._end_phase("start") if len(self.pids) == size else []
            case ModelLoaded():
                self._loaded[rank] = event
                return self._all_loaded() if len(self._loaded) == size else []
            case WorkerReady():
                self._warm[rank] = event
                return self._all_warm() if len(self._warm) == size else []
            case _:
                raise AssertionError(f"{type(event).__name__} during start-up")

    def forget(self, ranks: Iterable[int]) -> None:
        """These workers are replaced: `rejoin` brings each successor to the same state."""
        self._absent.update(ranks)

    def awaits(self, ranks: Iterable[int]) -> bool:
        """Whether one of the successors is not ready yet."""
        return not self._absent.isdisjoint(ranks)

    def rejoin(self, rank: int, event: WorkerEvent) -> bool:
        """Handle an event of a successor; True when it is ready.

        Raises SeedMismatch, or StartupError if it differs from the worker it replaces.
        """
        match event:
            case WorkerHello(pid=pid):
                self.pids[rank] = pid
                config = worker_config(self._config, rank, self._num_threads)
                self._executor.send(rank, LoadModel(config=self._with_limits_of_former(config)))
            case ModelLoaded():
                before = self._loaded[rank]
                digests = (before.digests_before_load, event.digests_before_load)
                compare_with_former(rank, self._names[rank], *digests, "before loading")
                alike = (*_ALIKE, *_ALIKE_IN_STAGE, *_CHOSEN)
                _refuse_other(rank, before, event, alike, "the worker that it replaces")
                # as many blocks as before; the worker itself refuses if they do not fit
                self._executor.send(rank, self._start_serving())
            case WorkerReady():
                ready = self._warm[rank]
                digests = (ready.digests_after_warm_up, event.digests_after_warm_up)
                compare_with_former(rank, self._names[rank], *digests, "after warm-up")
                _refuse_other(rank, ready, event, ("fingerprint",), "the worker that it replaces")
                self._absent.discard(rank)
                return True
            case _:
                raise AssertionError(f"{type(event).__name__} during the restart of worker {rank}")
        return False

    def change_weights(self, folder: str, digest: str) -> None:
        """All workers, and the successors of those that die, have the weights of this folder from now on."""
        self._config = with_weights(self._config, folder)
        for rank, loaded in self._loaded.items():
            self._loaded[rank] = replace(loaded, fingerprint=loaded.fingerprint | {"weights": digest})

    def memory(self, tags: Sequence[str]) -> list[object]:
        """Arguments with which a worker gets back what it has given back: `tags`, the folder of the weights if it is
        not its own, and the sizes of its caches."""
        serving = self._start_serving()
        return [list(tags), self._config.weights_path, serving.num_blocks, serving.num_state_slots]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the workers, once they are ready."""
        return self._first.fingerprint | self._warm[self._ranks.start].fingerprint

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps a worker accepts before it has answered the first one."""
        return self._first.max_steps_in_flight

    @property
    def step_lead_s(self) -> float:
        """How long before the end of a step the next one should be sent; 0: at once."""
        return self._first.step_lead_s

    @property
    def costs(self) -> StepCosts:
        """The expected costs of a worker's steps; of several stages', those of the last, which drafts."""
        return self._loaded[self._ranks.start + self._replica_size - self._stage_size].costs

    @property
    def max_prompt_tokens(self) -> int | None:
        """Maximum prompt tokens in one step; None: no extra limit."""
        return None if self._config.max_num_batched_tokens else self._first.max_prompt_tokens

    @property
    def attention_parity(self) -> int | None:
        """As ModelLoaded; None where the number of prompt tokens is the user's."""
        return None if self._config.max_num_batched_tokens else self._first.attention_parity

    def check_drafts(self, drafts: StartUp) -> None:
        """Call this when both are done. Raises SeedMismatch if a draft worker's seeds differ from the targets',
        ConfigError if its tokens differ."""
        names = [self._names[self._ranks.start], *drafts._names.values()]
        before = [self._first, *drafts._loaded.values()]
        after = [self._warm[self._ranks.start], *drafts._warm.values()]
        compare_digests([loaded.digests_before_load for loaded in before], "before the model is loaded", names)
        compare_digests([ready.digests_after_warm_up for ready in after], "after warm-up", names)
        expected, found = self._first.vocab_size, drafts._first.vocab_size
        if expected != found:
            speculative = self._config.speculative_config
            assert speculative is not None
            raise ConfigError(
                f"speculative_config: the draft model {speculative.model_path} has a vocabulary of {found} tokens, "
                f"and the model {self._config.model_path} one of {expected}; both must have the same tokens.",
                parameter="speculative_config",
                value=speculative.model,
            )

    @property
    def _first(self) -> ModelLoaded:
        return self._loaded[self._ranks.start]

    def _place_in_replica(self, rank: int) -> int:
        return (rank - self._ranks.start) % self._replica_size

    @property
    def _num_blocks(self) -> int:
        """All replicas get the same number of blocks, so the smallest memory decides."""
        return min(loaded.available_kv_blocks for loaded in self._loaded.values())

    @property
    def num_state_slots(self) -> int:
        """Likewise, of those that keep states; 0: the model keeps none."""
        keeping = (loaded.available_state_slots for loaded in self._loaded.values() if loaded.state_slot_bytes)
        return min(keeping, default=0)

    def _start_serving(self) -> StartServing:
        return StartServing(num_blocks=self._num_blocks, num_state_slots=self.num_state_slots)

    def _with_limits_of_former(self, config: WorkerConfig) -> WorkerConfig:
        """Set the limits that the replaced worker derived from its memory, since steps are planned for them."""
        former = self._loaded[config.rank]
        return replace(config, max_model_len=former.max_model_len, max_num_seqs=former.max_num_seqs)

    def _all_loaded(self) -> list[StartupProgress]:
        compare_digests([self._loaded[rank].digests_before_load for rank in self._ranks], "before the model is loaded")
        for rank in self._ranks:
            _refuse_other(rank, self._first, self._loaded[rank], _ALIKE, "rank 0")
            peer = self._ranks.start + self._place_in_replica(rank) // self._stage_size * self._stage_size
            _refuse_other(rank, self._loaded[peer], self._loaded[rank], _ALIKE_IN_STAGE, f"rank {peer}")
        for rank in self._ranks:
            self._executor.send(rank, self._start_serving())
        return self._end_phase("load", (loaded.phase_seconds for loaded in self._loaded.values()))

    def _all_warm(self) -> list[StartupProgress]:
        compare_digests([self._warm[rank].digests_after_warm_up for rank in self._ranks], "after warm-up")
        for rank in self._ranks:
            _refuse_other(rank, self._warm[self._ranks.start], self._warm[rank], ("fingerprint",), "rank 0")
        progress = self._end_phase("warm_up", (ready.phase_seconds for ready in self._warm.values()))
        first = self._first
        self.ready = EngineReady(
            vocab_size=first.vocab_size,
            # here, too, all replicas get the same limits
            max_model_len=min(loaded.max_model_len for loaded in self._loaded.values()),
            eos_token_ids=first.eos_token_ids,
            num_blocks=self._num_blocks,
            block_size=first.block_size,
            world_size=len(self._ranks),
            fingerprint=self.fingerprint,
            phase_seconds=self._phase_seconds,
            worker_pids=[self.pids[rank] for rank in self._ranks],
            max_num_batched_tokens=first.max_num_batched_tokens,
            max_num_seqs=min(loaded.max_num_seqs for loaded in self._loaded.values()),
            pooling=first.pooling,
            kv_block_bytes=max(loaded.kv_block_bytes for loaded in self._loaded.values()),
        )
        return progress

    def _end_phase(self, phase: str, workers: Iterable[dict[str, float]] = ()) -> list[StartupProgress]:
        """`workers`: seconds of each worker's parts of the phase; those of the slowest worker are kept."""
        now = time.monotonic()
        seconds, self._phase_began = now - self._phase_began, now
        self._phase_seconds[phase] = seconds
        compiled = 0.0
        for parts in workers:
            # on a GPU a process compiles while weights are loaded, and the rest is waited for
            compiled = max(compiled, parts.get("compile", 0.0) + parts.get("compile_kernels", 0.0))
            for name, value in parts.items():
                key = f"{phase}.{name}"
                self._phase_seconds[key] = max(value, self._phase_seconds.get(key, 0.0))
        return [StartupProgress(phase=phase, seconds=seconds, compile_seconds=compiled)]


def _refuse_other(rank: int, one: WorkerEvent, other: WorkerEvent, alike: tuple[str, ...], model: str) -> None:
    for field in alike:
        expected, found = getattr(one, field), getattr(other, field)
        if expected != found:
            raise StartupError(
                f"rank {rank} differs from {model} in {field}: expected {expected}, found {found}; "
                "all workers must run the same versions on the same kind of device",
                rank=rank,
                cause=field,
            )
