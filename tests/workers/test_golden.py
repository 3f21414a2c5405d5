"""Axis A16 for families: the bits of a small model of each, recorded once.

Its weights are whole numbers over a power of two, which every machine makes alike. To change bits on purpose, raise the
number of CPU_PROFILE and record what is found here.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sempre.ipc.messages import SamplingSpec
from sempre.workers.fingerprint import CPU_PROFILE, cpu_architecture
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, parameters
from sempre.workers.models.registry import build_model, parse_spec
from sempre.workers.quantization.plain import NotQuantized

# recorded on the first; code generated for the second was found to give the same
RECORDED_ON = ("x86_64-avx512f", "x86_64-avx2")
RECORDED: dict[str, dict[str, str]] = {
    "cpu-fma-3": {
        "gemma2": "fed4ca053e595822",
        "gemma3": "d5fc8d4fbcd88ce6",
        "gemma3-odd": "410a96b79d20500c",
        "gemma4": "f0e2b3d3d45d8245",
        "gemma4-odd": "a2f8baf15a1c6c8d",
        "gemma4-moe": "af0c2caafc8a0fa2",
        "glm4-odd": "ef7d938ab0e52869",
        "glm4-moe-odd": "fd798bd1afe71f13",
        "gpt-oss-odd": "14c08b636de67dd3",
        "granite": "56ef499691bb4e81",
        "mixtral": "4f9751ac355199bf",
        "olmo2-odd": "505685601b8fdf58",
        "olmo3": "9856746bdca7d765",
        "phi3-long": "567df4ba0399c545",
        "qwen2-moe-odd": "d37f9c74636a3b37",
        "qwen3-moe-odd": "4712575bf80f759d",
        "qwen3-next": "8c1b90af9f5a1ce7",
        "qwen3.5-odd": "fd553713360b4193",
        "qwen3.5-moe": "efa744421b5595c6",
        "smollm3-odd": "5c48a89456f9e735",
    },
}
PARAMS = SamplingSpec(max_tokens=12, temperature=0.0, logprobs=2, prompt_logprobs=2)


def write(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint whose tensors follow from their names."""
    (folder / "config.json").write_text(json.dumps(config))
    model = build_model(Build(INVARIANT, NotQuantized()), parse_spec(config, {}))
    tensors = {}
    for name, parameter in parameters(model).items():
        whole = np.random.default_rng(zlib.crc32(name.encode())).integers(-256, 257, parameter.shape)
        around = 1.0 if "norm" in name and parameter.initial == "ones" else 0.0
        tensors[name] = torch.from_numpy(around + whole.astype(np.float32) / 1024)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.skipif(
    cpu_architecture() not in RECORDED_ON, reason=f"recorded on {RECORDED_ON}, not {cpu_architecture()}"
)
@pytest.mark.parametrize("family", RECORDED[CPU_PROFILE])
def test_the_recorded_digests(family: str, config_of: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    write(tmp_path, config_of(family))
    ids = [3 + 7919 * i % 317 for i in range(70)]
    run = {
        numerics: serve(tmp_path, numerics=numerics).run(prompt("a", ids, PARAMS))["a"]
        for numerics in ("invariant", "control")
    }
    found = {numerics: digest(finished) for numerics, finished in run.items()}
    assert found["invariant"] == RECORDED[CPU_PROFILE][family]
    assert found["control"] != found["invariant"]


def digest(finished: Any) -> str:
    """Of the token ids and all log-probabilities."""
    assert finished.errors == []
    state = hashlib.sha256(np.array(finished.token_ids, "<i4").tobytes())
    for part in [*finished.prompt_logprobs, *finished.logprobs]:
        state.update(part.token_ids + part.logprobs)
    return state.hexdigest()[:16]
