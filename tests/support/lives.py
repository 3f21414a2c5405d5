"""Lives of an engine as plain data: how it is set up, and what happens to it. They can be drawn, run, kept and read.

Whatever happened before and beside it, every finished request must equal the same request alone in a fresh engine of
one process, bit for bit; and it may only reuse cached blocks of requests with its own salt and adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
from adapters import ALL, ATTENTION, adapter_spec, save_adapter, tiny_modules
from hypothesis import strategies as st
from workload import KV_BLOCK_BYTES, SETTINGS, launch_inproc, make_requests

from sempre.engine.client import EngineClient
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import COORDINATOR, Cluster, Generation, compare_generations, generate, make_request
from sempre.engine.harness.generation import apply_delta
from sempre.ipc.messages import (
    AbortRequests,
    AdapterSpec,
    AddRequests,
    GetMetrics,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    RequestSpec,
    ResetPrefixCache,
    ResumeRequests,
)

BLOCK = 16
PATIENCE_S = 300.0
# equal logits: a bias so great that float32 rounds away what the model says; top_p keeps the lowest four ids of eight
TIED = list(range(200, 208))
KEPT_OF_TIED = TIED[:4]
# what decides bits: each needs lone runs of its own
DECIDING = ("quantization", "numerics_profile", "numerics")
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16, "max_cpu_loras": 2}
# a coordinator or worker may be killed any number of times
ENDURING: dict[str, Any] = {"max_request_crashes": 50, "max_restarts": 100}


def draft_model(**settings: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3, **settings}


DRAFTS: list[dict[str, Any]] = [
    {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False},
    {"method": "suffix", "num_speculative_tokens": 4},
    draft_model(adaptive=False),
]
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "drafts": [{"speculative_config": each} for each in DRAFTS],
    "adapters": [LORA, LORA | {"speculative_config": DRAFTS[0]}],
    "formats": [
        *[{"quantization": name} for name in ("fp8", "fp8_weight_only", "int8", "int4")],
        {"numerics_profile": "tree8", "speculative_config": DRAFTS[1]},
    ],
    "processes": [
        LORA | {"data_parallel_size": 2},
        {"tensor_parallel_size": 2, "numerics_profile": "tree8"},
        {"speculative_config": draft_model(placement="worker", adaptive=False)},
        {"quantization": "int8"},
    ],
    "control": [{"numerics": "control"}],
}


@dataclass(frozen=True)
class Life:
    """`events` are lists of a name and its arguments: see `Engine`."""

    engine: dict[str, Any]
    events: list[list[Any]] = field(default_factory=list)
    in_processes: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Life:
        return cls(**json.loads(text))


def templates() -> list[RequestSpec]:
    """The requests that lives are made of."""
    tied: dict[str, Any] = {"logit_bias": dict.fromkeys(TIED, 1e9), "top_p": 0.45, "max_tokens": 12, "logprobs": 2}
    repeated = [31, 500, 77, 900, 31, 2500] * 20
    return [
        *make_requests(),
        make_request([5, 9, 300], seed=77, **tied),
        # what repeats, so that drafts are accepted
        make_request(repeated, seed=78, max_tokens=48, temperature=0.0, logprobs=1),
        # long outputs, so that blocks are asked for while others run
        make_request(repeated[:33], seed=79, max_tokens=90, temperature=0.8, logprobs=0, prompt_logprobs=1),
    ]


TEMPLATES = templates()
TIED_TEMPLATE = len(TEMPLATES) - 3


@cache
def adapters() -> tuple[AdapterSpec, ...]:
    """Three adapters of other ranks and modules."""
    folder = Path(mkdtemp())
    kinds = [(4, ATTENTION), (16, ALL), (9, ("gate_proj", "up_proj", "down_proj"))]
    return tuple(
        adapter_spec(save_adapter(folder / f"{seed}", tiny_modules(modules), rank=rank, seed=seed))
        for seed, (rank, modules) in enumerate(kinds)
    )


def request_of(template: int, adapter: int | None, **changes: Any) -> RequestSpec:
    spec = None if adapter is None else adapters()[adapter]
    return msgspec.structs.replace(TEMPLATES[template], adapter=spec, **changes)


class LoneRuns:
    """Requests alone, one after the other, in an engine of one process without a prefix cache: what is right."""

    def __init__(self) -> None:
        self._clients: dict[str, InprocClient] = {}
        self._found: dict[tuple[str, int, int | None], Generation] = {}

    def get(self, deciding: dict[str, Any], template: int, adapter: int | None) -> Generation:
        """Return the result of one request; computed when it is first asked for."""
        settings = deciding | ({} if adapter is None else LORA)
        key = json.dumps(settings, sort_keys=True)
        if (key, template, adapter) not in self._found:
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = launch_inproc(enable_prefix_caching=False, **settings)
            [found] = generate(client, [request_of(template, adapter)])
            self._found[key, template, adapter] = found
        return self._found[key, template, adapter]


LONE = LoneRuns()


class Engine:
    """One engine and all that was asked of it. Each method without an underscore is an event."""

    def __init__(self, client: EngineClient, deciding: dict[str, Any], cluster: Cluster | None) -> None:
        self._client = client
        self._deciding = deciding
        self._cluster = cluster
        self._asked: dict[str, tuple[int, int | None, str | None]] = {}
        self._results: dict[str, Generation] = {}
        self._running: dict[str, None] = {}
        self._paused: dict[str, None] = {}
        self._num_calls = 0
        self._was_killed = False

    def ask(self, wanted: list[list[int | None]], salt: str | None) -> None:
        """Some requests arrive together: template, adapter and priority of each."""
        requests = []
        for template, adapter, priority in wanted:
            assert template is not None
            name = str(len(self._asked))
            changes: dict[str, Any] = {"request_id": name, "ordinal": len(self._asked), "cache_salt": salt}
            requests.append(request_of(template, adapter, priority=priority, **changes))
            self._asked[name] = (template, adapter, salt)
            self._results[name], self._running[name] = Generation(name), None
        self._client.send(AddRequests(requests=requests))

    def compute(self, num_events: int) -> None:
        for _ in range(num_events):
            if not self._running.keys() - self._paused.keys():
                return
            self._receive()

    def abort(self, place: int) -> None:
        if self._running:
            name = list(self._running)[place % len(self._running)]
            self._client.send(AbortRequests(request_ids=[name]))
            del self._running[name], self._results[name]
            self._paused.pop(name, None)

    def pause(self, place: int) -> None:
        if self._running:
            name = list(self._running)[place % len(self._running)]
            self._client.send(PauseRequests(request_ids=[name]))
            self._paused[name] = None

    def resume(self) -> None:
        if self._paused:
            self._client.send(ResumeRequests(request_ids=list(self._paused)))
            self._paused.clear()

    def reset(self) -> None:
        """The prefix cache forgets everything."""
        self._num_calls += 1
        self._client.send(ResetPrefixCache(call_id=self._num_calls))

    def kill(self, target: int) -> None:
        """A worker dies, or the coordinator for -1; without processes nothing happens."""
        if self._cluster is None:
            return
        self._was_killed = True
        # one that was killed before may not be replaced yet
        with suppress(ProcessLookupError):
            self._cluster.kill(COORDINATOR if target < 0 else target % len(self._cluster.worker_pids()))

    def _receive(self) -> None:
        event = self._client.receive(PATIENCE_S)
        assert event is not None, f"nothing came within {PATIENCE_S:g} s"
        if not isinstance(event, OutputsReady):
            return
        for delta in event.outputs:
            if delta.request_id in self._running:
                apply_delta(self._results[delta.request_id], delta)
                if delta.finish_reason is not None:
                    del self._running[delta.request_id]
                    self._paused.pop(delta.request_id, None)

    def _finish(self) -> None:
        """Everything that was asked for comes, and is right."""
        self.resume()
        while self._running:
            self._receive()
        may_find_its_own = self._was_killed or self._num_preemptions() > 0
        for name, found in self._results.items():
            template, adapter, _ = self._asked[name]
            comparison = compare_generations([LONE.get(self._deciding, template, adapter)], [found])
            assert comparison.equal, f"template {template}, adapter {adapter}: {comparison.first_difference}"
            if template == TIED_TEMPLATE:
                assert set(found.token_ids) <= set(KEPT_OF_TIED), "of equal logits those of the highest ids were kept"
            if not may_find_its_own:
                most = max((self._shared(name, other) for other in self._asked if other != name), default=0)
                assert found.num_cached_tokens <= most, (
                    f"template {template}: {found.num_cached_tokens} cached tokens, {most} of its salt and adapter"
                )

    def _shared(self, name: str, other: str) -> int:
        """The tokens of whole blocks that two requests may share."""
        (template, *rest), (other_template, *other_rest) = self._asked[name], self._asked[other]
        if rest != other_rest:
            return 0
        prompt = TEMPLATES[template].prompt_token_ids
        outputs = (
            self._results[other].token_ids
            if other in self._results
            else LONE.get(
                self._deciding,
                other_template,
                rest[0],  # type: ignore[arg-type]
            ).token_ids
        )
        theirs = [*TEMPLATES[other_template].prompt_token_ids, *outputs]
        length = next((i for i, (a, b) in enumerate(zip(prompt, theirs, strict=False)) if a != b), len(prompt))
        return length // BLOCK * BLOCK

    def _num_preemptions(self) -> float:
        self._num_calls += 1
        self._client.send(GetMetrics(call_id=self._num_calls))
        while not isinstance(reply := self._client.receive(PATIENCE_S), MetricsReply):
            assert reply is not None, "no metrics came"
        value = reply.values["num_preemptions"]
        return sum(value) if isinstance(value, list) else 0.0


def run(life: Life) -> None:
    """Live it. Raises AssertionError for the first result that is not right."""
    deciding = {name: life.engine[name] for name in DECIDING if name in life.engine}
    with _launched(life) as (client, cluster):
        engine = Engine(client, deciding, cluster)
        for name, *arguments in life.events:
            getattr(engine, name)(*arguments)
        engine._finish()


@contextmanager
def _launched(life: Life) -> Iterator[tuple[EngineClient, Cluster | None]]:
    settings = dict(life.engine)
    num_blocks = settings.pop("num_blocks", None)
    if num_blocks is not None:
        drafts = settings.get("speculative_config") or {}
        is_shared = drafts.get("method") == "draft_model" and drafts.get("placement") != "worker"
        # of a draft model in the same worker, each block has two layers of one head
        settings["kv_cache_memory_bytes"] = num_blocks * (KV_BLOCK_BYTES + is_shared * KV_BLOCK_BYTES // 6)
    if life.in_processes:
        with Cluster(**SETTINGS, **ENDURING, **settings) as cluster:
            yield cluster.client, cluster
        return
    client = launch_inproc(**settings)
    try:
        yield client, None
    finally:
        client.close()


def lives(kind: str) -> st.SearchStrategy[Life]:
    """Draw lives of one of KINDS."""
    choices = KINDS[kind]
    is_shared = kind == "processes"

    @st.composite
    def draw_life(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Life:
        engine = draw(_ENGINES) | draw(st.sampled_from(choices))
        asks = _asks(with_adapters="enable_lora" in engine)
        names = _EVENTS + [st.tuples(st.just("kill"), st.integers(-1, 1))] * (2 * is_shared)
        events = draw(st.lists(st.one_of(asks, asks, *names), min_size=5, max_size=12))
        return Life(engine, [list(draw(asks)), *map(list, events)], is_shared)

    return draw_life()


def shrunk(life: Life, num_tries: int) -> Life:
    """Leave out what a failing life does not need to fail, with at most so many tries."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(life):
            if not num_tries:
                return life
            num_tries -= 1
            if _fails(smaller):
                life, is_smaller = smaller, True
                break
    return life


def _fails(life: Life) -> bool:
    try:
        run(life)
    except Exception:
        return True
    return False


def _smaller(life: Life) -> Iterator[Life]:
    """Lives with an event, a request or a setting less."""
    events = life.events
    if life.in_processes and not {"data_parallel_size", "tensor_parallel_size"} & life.engine.keys():
        yield replace(life, in_processes=False)
    for half in (events[: len(events) // 2], events[len(events) // 2 :]) if len(events) > 3 else ():
        yield replace(life, events=half)
    for at in reversed(range(len(events))):
        yield replace(life, events=events[:at] + events[at + 1 :])
    for at, (name, *arguments) in enumerate(events):
        if name == "ask":
            wanted, salt = arguments
            for i in range(len(wanted)):
                fewer = [name, wanted[:i] + wanted[i + 1 :], salt]
                yield replace(life, events=[*events[:at], *([fewer] if fewer[1] else []), *events[at + 1 :]])
    for name in life.engine:
        if name not in DECIDING:
            yield replace(life, engine={key: value for key, value in life.engine.items() if key != name})


_ENGINES = st.fixed_dictionaries(
    {
        "max_num_seqs": st.sampled_from([2, 3, 8, 8]),
        "max_num_batched_tokens": st.sampled_from([16, 33, 64, 256]),
        # the fewest hold the longest request alone, so that others are preempted; that is drawn more often
        "num_blocks": st.sampled_from([34, 34, 400]),
        "enable_prefix_caching": st.booleans(),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
    }
)
_EVENTS: list[st.SearchStrategy[Any]] = [
    st.tuples(st.just("compute"), st.integers(1, 20)),
    st.tuples(st.just("compute"), st.integers(5, 40)),
    st.tuples(st.just("abort"), st.integers(0, 7)),
    st.tuples(st.just("pause"), st.integers(0, 7)),
    st.tuples(st.just("resume")),
    st.tuples(st.just("reset")),
]


def _asks(*, with_adapters: bool) -> st.SearchStrategy[Any]:
    adapter = st.sampled_from([None, 0, 1, 2]) if with_adapters else st.none()
    # the templates with a common beginning, ties and long outputs are drawn more often
    template = st.one_of(st.integers(0, len(TEMPLATES) - 1), st.sampled_from([7, 8, 9, 10, *range(16, len(TEMPLATES))]))
    one = st.tuples(template, adapter, st.integers(0, 1)).map(list)
    return st.tuples(st.just("ask"), st.lists(one, min_size=1, max_size=4), st.sampled_from([None, None, "a", "b"]))
