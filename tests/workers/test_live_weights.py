"""New weights for a worker's model: for every family the bits of a worker that has loaded them itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sempre.ipc.error_info import restore
from sempre.ipc.errors import ConfigError, TensorMismatch
from sempre.ipc.messages import CallMethod, SamplingSpec
from sempre.workers.loading import live_digest

FAMILIES = [
    "llama-multi-head-tied", "llama-biases", "qwen3-biases", "qwen3-moe", "qwen3.5", "qwen3.5-moe-multimodal",
    "mixtral", "glm4-odd", "glm4-moe", "gemma2", "gemma3", "gemma4", "gemma4-moe", "gpt-oss", "granite", "olmo3",
    "phi3-part", "smollm3",
]  # fmt: skip
PARAMS = SamplingSpec(max_tokens=6, logprobs=0, prompt_logprobs=0)


def call(worker: Any, method: str, *args: object) -> Any:
    """The result of a worker's method. Raises its error."""
    reply = worker.worker.call(CallMethod(call_id=0, method=method, args=list(args)))
    if reply.error is not None:
        raise restore(reply.error) or AssertionError(reply.error)
    return reply.result


def other_weights(source: Path, folder: Path) -> Path:
    """The checkpoint with other values."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        random = torch.Generator().manual_seed(5)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=random).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def bits(worker: Any, prompt: Any) -> tuple[list[int], bytes]:
    ids = np.random.default_rng(3).integers(3, 320, 40).tolist()
    result = worker.run(prompt("a", ids, PARAMS, chunks=(16,)))["a"]
    assert result.errors == []
    return result.token_ids, b"".join(rows.logprobs for rows in [*result.prompt_logprobs, *result.logprobs])


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.product), "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_of_a_worker_that_loaded_them(
    family: str, dtype: str, checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    folder = other_weights(checkpoints(family).folder, tmp_path / "new")
    worker, fresh = serve(checkpoints(family).folder, dtype=dtype), serve(folder, dtype=dtype)
    before = bits(worker, prompt)
    digest = call(worker, "_stage_weights", str(folder))
    assert bits(worker, prompt) == before
    call(worker, "_commit_weights")
    assert bits(worker, prompt) == bits(fresh, prompt) != before
    assert call(worker, "fingerprint") == call(fresh, "fingerprint")
    assert digest == call(fresh, "fingerprint")["weights"]
    assert call(worker, "parameter_digest") == call(fresh, "parameter_digest")
    assert call(worker, "self_test") == call(fresh, "self_test")


def test_what_is_not_staged_cannot_be_committed(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    folder = other_weights(checkpoints("llama").folder, tmp_path / "new")
    worker = serve(checkpoints("llama").folder)
    before = bits(worker, prompt)
    call(worker, "_stage_weights", str(folder))
    call(worker, "_drop_weights")
    with pytest.raises(Exception, match="expected staged weights"):
        call(worker, "_commit_weights")
    assert bits(worker, prompt) == before


def test_other_storage_is_refused(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    """float32 keeps 16-bit matrices in 16 bit, and a matrix in memory does not change its dtype."""
    folder = shutil.copytree(checkpoints("llama").folder, tmp_path / "new")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    worker = serve(checkpoints("llama").folder, dtype="float32")
    before = bits(worker, prompt)
    with pytest.raises(TensorMismatch, match=r"expected float32 .* in memory, as now, found bfloat16"):
        call(worker, "_stage_weights", str(folder))
    assert bits(worker, prompt) == before


def test_methods_of_an_update_are_not_named(checkpoints: Any, serve: Any) -> None:
    with pytest.raises(ConfigError) as error:
        call(serve(checkpoints("llama").folder), "stage_weights")
    assert "_stage_weights" not in str(error.value)


def test_a_digest_notices_one_tensor(checkpoints: Any, serve: Any) -> None:
    """`parameter_digest` is of what is in memory: the test of bits above compares all of it."""
    model = serve(checkpoints("llama").folder).worker._loaded.model
    before = live_digest(model)
    model.model.norm.weight[0] += 1
    assert live_digest(model) != before
