"""The frozen configuration of an engine: the one source for Python keywords, CLI flags, documents and fingerprint.

It travels to the coordinator as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SchedulingPolicy = Literal["fcfs", "priority"]
Numerics = Literal["invariant", "control"]
SpeculativeMethod = Literal["ngram", "suffix", "draft_model"]
Quantization = Literal["fp8", "fp8_weight_only"]
Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")


def _doc(text: str) -> Meta:
    return Meta(description=text)


class SpeculativeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are guessed ahead of the model; the outputs are the same with any of it, and without."""

    method: Annotated[SpeculativeMethod, _doc("where guesses come from")]
    model: Annotated[str | None, _doc("the draft model, for method draft_model")] = None
    model_path: Annotated[Path | None, _doc("the local folder that `model` was resolved to")] = None
    num_speculative_tokens: Annotated[int, _doc("most guesses per request and step")] = 4
    placement: Annotated[
        Literal["colocated", "worker"], _doc("the draft model in the target's worker, or in a worker of its own")
    ] = "colocated"
    adaptive: Annotated[bool, _doc("fewer guesses, or none, for a request whose guesses go wrong")] = True
    prompt_lookup_min: Annotated[int, _doc("shortest n-gram that is looked up, tokens")] = 2
    prompt_lookup_max: Annotated[int, _doc("longest n-gram that is looked up, tokens; for method ngram")] = 5


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. Build it with `engine.arguments.engine_config(...)`, which validates and resolves."""

    model: Annotated[str, _doc("name in the catalogue, folder, or hub id")]
    model_path: Annotated[Path, _doc("the local folder that `model` was resolved to")]
    seed: Annotated[int, _doc("the engine's: seeds workers, and what requests without a seed of their own get")] = 0
    dtype: Annotated[Dtype, _doc("storage of weights and KV cache; auto is the checkpoint's")] = "auto"
    quantization: Annotated[
        Quantization | None,
        _doc("fp8: matrices and their inputs; fp8_weight_only: matrices; None is the checkpoint's"),
    ] = None
    max_model_len: Annotated[
        int | None, _doc("longest prompt plus output, tokens; None is the model's, or what the KV cache holds if less")
    ] = None
    max_num_seqs: Annotated[
        int | None, _doc("most sequences in one step; None is 128, and on a GPU up to 1,024 as memory and model allow")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, _doc("most tokens in one step; longer prompts are cut; None is the device's best")
    ] = None
    block_size: Annotated[int | None, _doc("tokens in one KV cache block; None is the device's best")] = None
    enable_prefix_caching: Annotated[bool, _doc("reuse the KV cache of equal prefixes")] = True
    kv_cache_memory_bytes: Annotated[
        int | None, _doc("KV cache of one worker, a draft model's included; None: from free memory")
    ] = None
    data_parallel_size: Annotated[int, _doc("replicas of the model, one worker each")] = 1
    tensor_parallel_size: Annotated[int, _doc("workers that share one replica; 1 for now")] = 1
    num_threads: Annotated[int, _doc("compute threads of one worker; 0 divides the usable cores")] = 0
    multiprocessing: Annotated[bool, _doc("coordinator and workers in processes of their own")] = True
    scheduling_policy: Annotated[SchedulingPolicy, _doc("order of waiting requests")] = "fcfs"
    device: Annotated[Device, _doc("where workers compute; auto is cuda where there is a GPU")] = "auto"
    gpu_memory_utilization: Annotated[float, _doc("share of a GPU's memory that its worker may use")] = 0.92
    enforce_eager: Annotated[bool, _doc("no CUDA graphs; the results are the same")] = False
    speculative_config: Annotated[
        SpeculativeConfig | None, _doc("guess tokens ahead, for speed alone: method, model, num_speculative_tokens, …")
    ] = None
    numerics: Annotated[
        Numerics, _doc("`control` uses the ordinary, non-invariant matrix product: only to show that tests can fail")
    ] = "invariant"
    load_format: Annotated[Literal["auto", "safetensors", "dummy"], _doc("dummy: seeded random weights")] = "auto"
    max_logprobs: Annotated[int, _doc("most log-probabilities per token; -1 allows the whole vocabulary")] = 20
    heartbeat_interval_s: Annotated[float, _doc("seconds between heartbeats")] = 0.5
    heartbeat_timeout_s: Annotated[float, _doc("a silent process counts as stuck after this many seconds")] = 30.0
    step_timeout_s: Annotated[float, _doc("a step that takes longer counts as stuck: the engine is unhealthy")] = 120.0
    startup_timeout_s: Annotated[float, _doc("seconds a worker may take to become ready")] = 600.0
    max_restarts: Annotated[
        int, _doc("restarts of one worker, or of the coordinator, per restart_window_s; one more ends the engine")
    ] = 5
    restart_window_s: Annotated[float, _doc("seconds after which a restart no longer counts")] = 600.0
    max_request_crashes: Annotated[
        int, _doc("a request at work in this many crashes of a worker fails; alone after the first of them")
    ] = 3
    max_message_bytes: Annotated[int, _doc("largest frame accepted on a socket")] = 256 * 1024 * 1024


def encode_json(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value, enc_hook=_encode_path)


def decode_json(data: bytes, kind: type[T]) -> T:
    """Raises msgspec.ValidationError naming the field that does not fit."""
    return msgspec.json.decode(data, type=kind, dec_hook=_decode_path)


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} has no JSON form")
