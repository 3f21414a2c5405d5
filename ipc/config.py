"""The settings of an engine, each written once: keywords, flags, documentation, ranges and messages derive from it.

They travel to the coordinator as JSON, and to the workers with the facts of their rank, in msgpack.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from sempre.ipc.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvCacheDtype = Literal["auto", "fp8"]
SchedulingPolicy = Literal["fcfs", "priority"]
Numerics = Literal["invariant", "control"]
NumericsProfile = Literal["single", "tree8"]
SpeculativeMethod = Literal["ngram", "suffix", "draft_model"]
Quantization = Literal["fp8", "fp8_weight_only", "int8", "int4", "integer"]
Device = Literal["auto", "cpu", "cuda"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Role = Literal["target", "draft"]
Runner = Literal["auto", "generate", "pooling"]
Convert = Literal["auto", "none", "embed", "classify"]
PoolingTask = Literal["embed", "classify"]
PoolingKind = Literal["LAST", "MEAN", "CLS"]

# what a message can carry
_MOST = 2**63 - 1
Count = Annotated[int, Meta(ge=1, le=_MOST)]
Port = Annotated[int, Meta(ge=1, le=65535)]
NonNegative = Annotated[int, Meta(ge=0, le=_MOST)]
Queued = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Size = Annotated[int, Meta(ge=1, le=_MOST, extra={"is_size": True})]
"""may be given as text: 2k, 4GiB"""
Seconds = Annotated[float, Meta(gt=0, le=1e9)]

MAX_DRAFT_TOKENS = 256
"""of all requests in one step, so that the logits of their rows fit into a buffer of known size"""
BLOCK_SIZES = {"cpu": (16,), "cuda": (64, 32, 16)}
"""KV cache block sizes, in tokens, that a device's kernels support, best first"""


def doc(text: str) -> Meta:
    return Meta(description=text)


class SpeculativeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drafted ahead of the model; the outputs are the same with it and without."""

    method: Annotated[SpeculativeMethod, doc("where draft tokens come from")]
    model: Annotated[str | None, doc("the draft model, for method draft_model")] = None
    model_path: Annotated[str | None, doc("the local folder that `model` was resolved to")] = None
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=32), doc("most draft tokens per request and step")] = 4
    placement: Annotated[
        Literal["colocated", "worker"], doc("the draft model runs in the target's worker, or in a separate worker")
    ] = "colocated"
    adaptive: Annotated[bool, doc("fewer draft tokens, or none, for a request whose drafts are rejected")] = True
    prompt_lookup_min: Annotated[Count, doc("shortest n-gram that is looked up, tokens")] = 2
    prompt_lookup_max: Annotated[Count, doc("longest n-gram that is looked up, tokens; for method ngram")] = 5


Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
"""Of two embeddings; distances are negative."""


class PoolerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a pooling model pools, instead of what its files say."""

    pooling_type: Annotated[
        PoolingKind | None, doc("of the last token, the mean over all, or of the first token (CLS)")
    ] = None
    use_activation: Annotated[
        bool | None, doc("embeddings have norm 1, classes probabilities; a request may decide otherwise")
    ] = None


class KVEventsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How changes of the prefix cache are published, in vLLM's messages and under its names.

    Whoever may connect reads the tokens of every prompt, and the cache salts.
    """

    enable_kv_cache_events: Annotated[bool, doc("publish which blocks are stored and removed")] = False
    publisher: Annotated[Literal["null", "zmq"] | None, doc("null publishes nothing; None is zmq where enabled")] = None
    endpoint: Annotated[
        str,
        doc("address of the PUB socket: ipc, or tcp, which is bound if it has * or ::, else connected to"),
    ] = "tcp://*:5557"
    replay_endpoint: Annotated[str | None, doc("address of the socket that repeats former batches; None: none")] = None
    buffer_steps: Annotated[Count, doc("batches kept to be repeated")] = 10_000
    hwm: Annotated[Queued, doc("messages queued for a slow subscriber, which misses more; 0: no limit")] = 100_000
    max_queue_size: Annotated[Queued, doc("batches queued for the publishing thread; 0: no limit")] = 100_000
    topic: Annotated[str, doc("first frame of every message")] = ""

    @property
    def publishes(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"

    def addresses(self, replica: int) -> list[str]:
        """Of one replica: its endpoint, then its replay endpoint, if any. Each replica has its own, on the port that
        many after the setting's."""
        return [_moved(address, replica) for address in (self.endpoint, self.replay_endpoint) if address is not None]


def _moved(address: str, replica: int) -> str:
    if not replica:
        return address
    if address.startswith("ipc://"):
        return f"{address}_dp{replica}"
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + replica}"


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. Build it with `engine.arguments.engine_config(...)`, which validates and resolves."""

    model: Annotated[str, doc("name in the catalogue, folder, or hub id")]
    model_path: Annotated[str, doc("the local folder that `model` was resolved to")]
    weights_path: Annotated[str | None, doc("folder of the weights in use; None is model_path")] = None
    seed: Annotated[
        int, Meta(ge=0), doc("the engine's seed: seeds workers, and requests without a seed of their own")
    ] = 0
    dtype: Annotated[Dtype, doc("dtype of weights and KV cache; auto is the checkpoint's")] = "auto"
    quantization: Annotated[
        Quantization | None,
        doc(
            "fp8: matrices and their inputs; fp8_weight_only: matrices; int8, int4: matrices in blocks, with inputs in "
            "int8, on a CPU; integer: the same with a GGUF file's own blocks; None is the checkpoint's"
        ),
    ] = None
    max_model_len: Annotated[
        Size | None, doc("longest prompt plus output, tokens; None is the model's, or what the KV cache holds if less")
    ] = None
    max_num_seqs: Annotated[
        Size | None, doc("most sequences in one step; None is 128, and on a GPU up to 1,024 as memory and model allow")
    ] = None
    max_num_batched_tokens: Annotated[
        Size | None, doc("most tokens in one step; longer prompts are cut; None is the device's best")
    ] = None
    block_size: Annotated[Count | None, doc("tokens in one KV cache block; None is the device's best")] = None
    enable_prefix_caching: Annotated[bool, doc("reuse the KV cache of equal prefixes")] = True
    kv_events_config: Annotated[
        KVEventsConfig | None, doc("publish changes of the prefix cache: enable_kv_cache_events, endpoint, topic, …")
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        doc(
            "keys and values in the cache; fp8: a byte each, with a scale per token and head, on a CPU; auto is dtype's"
        ),
    ] = "auto"
    kv_cache_memory_bytes: Annotated[
        Size | None, doc("KV cache of one worker, with states and a draft model's; None: from free memory")
    ] = None
    data_parallel_size: Annotated[Count, doc("replicas of the model")] = 1
    tensor_parallel_size: Annotated[
        int, Meta(ge=1, le=8), doc("workers that share each layer of a replica: 1, 2, 4 or 8")
    ] = 1
    pipeline_parallel_size: Annotated[
        Count, doc("stages of a replica, each with some of the layers, of tensor_parallel_size workers each")
    ] = 1
    nnodes: Annotated[
        Count, doc("hosts, each with an equal share of the workers; the others run `sempre serve --headless`")
    ] = 1
    node_rank: Annotated[NonNegative, doc("this host's number: 0 has the coordinator")] = 0
    master_addr: Annotated[str, doc("address of host 0, by which the others reach it")] = "127.0.0.1"
    master_port: Annotated[Port, doc("port of host 0 for the others")] = 29501
    node_key_file: Annotated[
        str | None, doc("file of mode 0600 with the secret that the hosts have in common; host 0 writes it if missing")
    ] = None
    num_threads: Annotated[NonNegative, doc("compute threads of one worker; 0 divides the usable cores")] = 0
    multiprocessing: Annotated[bool, doc("coordinator and workers run in separate processes")] = True
    scheduling_policy: Annotated[SchedulingPolicy, doc("order of waiting requests")] = "fcfs"
    device: Annotated[Device, doc("where workers compute; auto is cuda where there is a GPU")] = "auto"
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1), doc("share of a GPU's memory that its worker may use")
    ] = 0.92
    enforce_eager: Annotated[bool, doc("no CUDA graphs; the results are the same")] = False
    speculative_config: Annotated[
        SpeculativeConfig | None, doc("draft tokens ahead, only for speed: method, model, num_speculative_tokens, …")
    ] = None
    runner: Annotated[
        Runner, doc("generate text, or pool: embeddings, classes, scores; auto is what the model's files say")
    ] = "auto"
    convert: Annotated[
        Convert, doc("what a model that generates is pooled for: embed or classify; auto is what its files say")
    ] = "auto"
    pooler_config: Annotated[PoolerConfig | None, doc("pooling_type and use_activation, if not the model's own")] = None
    enable_lora: Annotated[bool, doc("serve low-rank adapters beside the model")] = False
    max_loras: Annotated[Count, doc("most adapters in one step; requests of others wait")] = 1
    max_lora_rank: Annotated[int, Meta(ge=1, le=512), doc("largest rank of an adapter")] = 16
    max_cpu_loras: Annotated[
        Count | None, doc("most adapters kept in a worker's memory, at least max_loras; None: as many as max_loras")
    ] = None
    numerics: Annotated[
        Numerics, doc("`control` uses the ordinary, non-invariant matmul: only to show that tests can fail")
    ] = "invariant"
    numerics_profile: Annotated[
        NumericsProfile | None,
        doc("order of sums: `tree8` gives equal bits for any tensor_parallel_size; None is single for 1, else tree8"),
    ] = None
    load_format: Annotated[LoadFormat, doc("dummy: seeded random weights")] = "auto"
    max_logprobs: Annotated[
        int, Meta(ge=-1, le=_MOST), doc("most log-probabilities per token; -1 allows the whole vocabulary")
    ] = 20
    logprobs_mode: Annotated[
        LogprobsMode,
        doc(
            "what log-probabilities are: of the raw logits, or processed, after penalties, masks, temperature, min_p, "
            "top_k and top_p; or these logits themselves. Prompts are never processed"
        ),
    ] = "raw_logprobs"
    heartbeat_interval_s: Annotated[Seconds, doc("seconds between heartbeats")] = 0.5
    heartbeat_timeout_s: Annotated[Seconds, doc("a silent process counts as stuck after this many seconds")] = 30.0
    step_timeout_s: Annotated[Seconds, doc("a longer step counts as stuck: the engine is unhealthy")] = 120.0
    startup_timeout_s: Annotated[Seconds, doc("seconds a worker may take to become ready")] = 600.0
    max_restarts: Annotated[
        NonNegative,
        doc("restarts of one worker, or of the coordinator, per restart_window_s; one more ends the engine"),
    ] = 5
    restart_window_s: Annotated[Seconds, doc("seconds after which a restart no longer counts")] = 600.0
    max_request_crashes: Annotated[
        Count, doc("a request running in this many crashes of a worker fails; after the first it runs alone")
    ] = 3
    max_message_bytes: Annotated[
        int, Meta(ge=1 << 16, le=_MOST, extra={"is_size": True}), doc("largest frame accepted on a socket")
    ] = 256 * 1024 * 1024

    @property
    def world_size(self) -> int:
        """All workers, without draft workers."""
        return self.data_parallel_size * self.replica_size

    @property
    def replica_size(self) -> int:
        """The workers of one replica: those of its first stage, then those of the next."""
        return self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def ranks_per_node(self) -> int:
        """The workers of one host, without draft workers."""
        return self.world_size // self.nnodes

    def crosses_nodes(self, rank: int) -> bool:
        """Whether the replica of a target's rank lies on several hosts."""
        return self._spans_nodes(rank, self.replica_size)

    def _spans_nodes(self, rank: int, size: int) -> bool:
        """Whether the ranks with which this one forms a group of `size` lie on several hosts."""
        first = rank // size * size
        return first // self.ranks_per_node != (first + size - 1) // self.ranks_per_node

    @property
    def weights_folder(self) -> str:
        """The folder of the weights in use."""
        return self.weights_path or self.model_path

    @property
    def profile(self) -> NumericsProfile:
        """`numerics_profile`, resolved."""
        return self.numerics_profile or ("single" if self.tensor_parallel_size == 1 else "tree8")

    @property
    def num_adapter_slots(self) -> int:
        """The most adapters in one step; 0: none are served."""
        return self.max_loras if self.enable_lora else 0

    @property
    def num_kept_adapters(self) -> int:
        """The most adapters in a worker's memory."""
        return max(self.num_adapter_slots, self.max_cpu_loras or 0)

    @property
    def max_draft_tokens(self) -> int:
        """The most draft tokens in one step, of all requests."""
        if self.speculative_config is None:
            return 0
        if self.max_num_seqs is None:
            return MAX_DRAFT_TOKENS
        return min(self.max_num_seqs * self.speculative_config.num_speculative_tokens, MAX_DRAFT_TOKENS)

    @property
    def colocated_draft_model(self) -> str | None:
        """The folder of the draft model that a target's worker also runs, if any."""
        speculative = self.speculative_config
        return speculative.model_path if speculative is not None and speculative.placement == "colocated" else None


C = TypeVar("C", bound=EngineConfig)


def with_weights(config: C, folder: str) -> C:
    """The settings with the weights of another folder, also in place of dummy ones."""
    load_format = "auto" if config.load_format == "dummy" else config.load_format
    return replace(config, weights_path=folder, load_format=load_format)


class WorkerConfig(EngineConfig, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=False):
    """The settings of an engine as one of its workers receives them, with the facts of its rank."""

    rank: NonNegative
    role: Role = "target"
    """a draft worker only drafts"""
    device_index: NonNegative = 0
    """of its GPU among the host's visible ones"""

    @property
    def stage_crosses_nodes(self) -> bool:
        """Whether the ranks of its stage are on several hosts."""
        return self._spans_nodes(self.rank, self.tensor_parallel_size)


def check_device_settings(config: EngineConfig, device: str) -> None:
    """Raise ConfigError for a setting that `device`, cpu or cuda, cannot honour."""
    sizes = BLOCK_SIZES[device]
    if config.block_size is not None and config.block_size not in sizes:
        raise ConfigError(
            f"block_size: a {device.upper()} has blocks of {' or '.join(map(str, sizes))} tokens only,"
            f" found {config.block_size}. Leave it out, which gives {sizes[0]}.",
            parameter="block_size",
            value=config.block_size,
        )
    if device != "cpu" and config.kv_cache_dtype == "fp8":
        raise ConfigError(
            "kv_cache_dtype: expected 'auto' on a GPU, found 'fp8', which is for CPUs only. Leave it out, or set"
            " device='cpu'.",
            parameter="kv_cache_dtype",
            value=config.kv_cache_dtype,
        )
    if device == "cpu" and config.num_threads > (cores := len(os.sched_getaffinity(0))):
        raise ConfigError(
            f"num_threads: expected at most the {cores} usable cores, found {config.num_threads}.",
            parameter="num_threads",
            value=config.num_threads,
        )


def check_kv_events(config: EngineConfig) -> None:
    """Raise ConfigError for addresses that the replicas cannot have, or events of a cache that is not there."""
    events = config.kv_events_config
    if events is None:
        return
    if events.publishes and not config.enable_prefix_caching:
        raise ConfigError(
            "kv_events_config: there are no events without a prefix cache. Leave out enable_kv_cache_events, or set"
            " enable_prefix_caching=True.",
            parameter="kv_events_config",
            value=events.enable_kv_cache_events,
        )
    last = 2**16 - config.data_parallel_size
    for name in ("endpoint", "replay_endpoint"):
        address = getattr(events, name)
        if address is not None and not _is_address(address, last):
            raise ConfigError(
                f"kv_events_config[{name!r}] must be ipc://PATH, or tcp://HOST:PORT with a port of 1 to {last}, got"
                f" {address!r}.",
                parameter="kv_events_config",
                value=address,
            )
    addresses = [address for replica in range(config.data_parallel_size) for address in events.addresses(replica)]
    twice = next((address for address in addresses if addresses.count(address) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"kv_events_config: {twice} would be used twice. Each of the {config.data_parallel_size} replicas has an"
            " endpoint and a replay_endpoint, on the ports that follow; leave room between the two.",
            parameter="kv_events_config",
            value=twice,
        )


def _is_address(address: str, last_port: int) -> bool:
    scheme, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    if scheme == "ipc":
        return bool(place)
    return scheme == "tcp" and bool(host) and port.isascii() and port.isdecimal() and 1 <= int(port) <= last_port
