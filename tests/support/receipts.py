"""Receipts for tests: recorded under load, and altered so that they still read as valid ones."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sempre.engine import LLM, Counter, LoRARequest, SamplingParams, StructuredOutputsParams
from sempre.engine.proof.dsse import envelope
from sempre.engine.proof.json_values import canonical_json

Change = Callable[[dict[str, Any]], None]

WORDS = ("It is a truth", "The sea, the sea, the", "a", "Once upon a time there was a", "It was the best of times")
SETTINGS: dict[str, Any] = {
    "max_model_len": 96,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 40,
    # 9 blocks of 16 tokens, enough for two or three sequences, so that others are preempted
    "kv_cache_memory_bytes": 9 * 49_152,
    "max_logprobs": -1,
}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3}


def mixed_requests(count: int) -> tuple[list[str], list[SamplingParams]]:
    """Prompts and parameters of every kind; prompts come again, so some are found in the prefix cache."""
    prompts, params = [], []
    for i in range(count):
        prompts.append(WORDS[i % len(WORDS)] + " and" * (i % 7) * 5)
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
            {"temperature": 1.3, "min_p": 0.01, "seed": -i - 2},
            {"presence_penalty": 0.5, "repetition_penalty": 1.2, "n": 2},
            {"stop": ["e", " the"], "seed": 2**64 - 1 - i},
            {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{1,20}")},
            {"logit_bias": {5: 3.5, 9: -100.0}, "bad_words": ["the"], "ignore_eos": True},
            {"logprobs": -1, "max_tokens": 3},
        ]
        params.append(SamplingParams(**{"max_tokens": 6 + i % 20, **kinds[i % len(kinds)]}))
    return prompts, params


def record_under_load(folder: Path, count: int, adapters: Sequence[Path] = (), **settings: Any) -> int:
    """Record `count` requests with drafts, preemptions and a worker killed in between; return the number of outputs.
    Where there are adapters, every other request has one of them."""
    prompts, params = mixed_requests(count)
    named = [LoRARequest(path.name, number, str(path)) for number, path in enumerate(adapters, 1)]
    chosen = [named[i // 2 % len(named)] if named and i % 2 else None for i in range(count)]
    if named:
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    with LLM("tiny", record=str(folder), speculative_config=SPECULATION, **{**SETTINGS, **settings}) as llm:
        half = len(prompts) // 2
        llm.enqueue(prompts[:half], params[:half], lora_request=chosen[:half])
        os.kill(llm._ready.worker_pids[0], signal.SIGKILL)
        outputs = llm.wait_for_completion(use_tqdm=False)
        outputs += llm.generate(prompts[half:], params[half:], use_tqdm=False, lora_request=chosen[half:])
        found = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    for name in ("num_preemptions", "prefix_cache_hits", "spec_decode_num_accepted_tokens", "worker_restarts"):
        assert found[f"sempre:{name}"], found
    assert all(completion.error is None for output in outputs for completion in output.outputs)
    return sum(len(output.outputs) for output in outputs)


def altered_receipt(line: bytes, change: Change, path: Path) -> Path:
    """Write one receipt, changed, alone in a file: it contradicts neither itself nor a line before."""
    statement = json.loads(base64.b64decode(json.loads(line)["payload"]))
    statement["predicate"]["runDetails"]["metadata"].pop("previous", None)
    change(statement)
    path.write_bytes(envelope(canonical_json(statement)) + b"\n")
    return path


def with_flipped_bit(model: Path, target: Path, tensor: str = "model.norm.weight") -> Path:
    """Copy a model, and flip the lowest bit of the first element of one tensor."""
    shutil.copytree(model, target)
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + start] ^= 1
    file.write_bytes(data)
    return target
