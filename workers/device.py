"""Which device a worker computes on."""

from __future__ import annotations

import torch

from sempre.ipc.errors import ConfigError


def resolve_device(name: str, rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda`; rank N of a host uses GPU N. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"device: expected 'auto' or 'cpu' or 'cuda', found {name!r}.", parameter="device", value=name
        )
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise ConfigError(
            f"device: expected a GPU for 'cuda', but this PyTorch ({torch.__version__}) {built}."
            " Use device='cpu', or check the driver with nvidia-smi.",
            parameter="device",
            value=name,
        )
    if rank >= count:
        raise ConfigError(
            f"device: expected a GPU for each worker, found {count} visible GPU(s) and a worker of rank {rank}."
            " Lower data_parallel_size, or make more GPUs visible (CUDA_VISIBLE_DEVICES).",
            parameter="device",
            value=name,
        )
    return torch.device("cuda", rank)
