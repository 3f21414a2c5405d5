"""Models on several GPUs, and how ranks find each other's memory, where there is no GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from exchange_cases import model_logits
from gpu_ranks import in_processes
from ranks import on_all_ranks
from safetensors.torch import save_file

from sempre.ipc.errors import ConfigError
from sempre.workers.cpu.exchange import SharedMemoryExchange
from sempre.workers.gpu import peer_memory
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, parameters
from sempre.workers.models.registry import build_model, load_spec
from sempre.workers.parallel import DeviceExchange, parallel_of
from sempre.workers.quantization.plain import NotQuantized

CONFIG = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "eos_token_id": 1,
}
TOKENS = [5, 66, 0, 33, 34, 12, 50]


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu/parallel runs the compiled kernels")


def checkpoint(folder: Path, architecture: str, *, tied: bool) -> Path:
    """Random weights."""
    config = {**CONFIG, "architectures": [architecture], "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    model = build_model(Build(INVARIANT, NotQuantized()), load_spec(folder))
    tensors = {
        name: torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.initial == "ones")
        for name, parameter in parameters(model).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.product
@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("Qwen3ForCausalLM", False),
        pytest.param("Gemma2ForCausalLM", True, marks=pytest.mark.product),
    ],
)
def test_two_ranks_compute_the_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    """The interpreter's matmuls add in any order, so only nearly; the bits are compared on GPUs."""
    folder = checkpoint(tmp_path, architecture, tied=tied)
    [expected] = in_processes(1, model_logits, tmp_path, folder, TOKENS)
    first, second = in_processes(2, model_logits, tmp_path, folder, TOKENS)
    assert first.shape == (len(TOKENS), CONFIG["vocab_size"])
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first.roll(1, 0), expected, rtol=1e-2, atol=1e-2), "the control: another token's"


def test_ranks_tell_each_other_bytes() -> None:
    descriptor = os.memfd_create("host")

    def run(rank: int) -> list[list[bytes]]:
        host = SharedMemoryExchange(descriptor, rank, 3)
        return [peer_memory.share(host, rank, 3, b"%d" % rank * times) for times in (1, 0, 4092, 2)]

    expected = [[b"%d" % rank * times for rank in range(3)] for times in (1, 0, 4092, 2)]
    assert on_all_ranks(3, run) == [expected] * 3
    os.close(descriptor)


@pytest.mark.parametrize(
    ("other_device", "reaches", "message"),
    [
        (0, True, "expected a GPU for each rank, found ranks 0 and 1 on GPU 0"),
        (1, False, "found that GPU 0 does not reach GPU 1"),
    ],
)
def test_gpus_that_cannot_share_memory_are_refused(
    other_device: int, reaches: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: reaches)
    with pytest.raises(ConfigError, match=message) as refused:
        peer_memory._check_peer(0, torch.device("cuda", 0), 1, other_device)
    assert refused.value.parameter == "tensor_parallel_size"


class NoExchange:
    """Of a model that is never computed."""


def test_models_with_experts_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    devices: DeviceExchange = NoExchange()  # type: ignore[assignment]
    build = Build(INVARIANT, NotQuantized(), parallel_of("tree8", 0, 2, devices=devices))
    with pytest.raises(ConfigError, match="expected 1 on GPUs for a model with experts, found 2"):
        build_model(build, load_spec(tmp_path))
