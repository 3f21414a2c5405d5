"""The kernels of ranks on GPUs, each rank a process: on as many GPUs, or in Triton's interpreter, where all map the
same files."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from sempre.workers.cpu.exchange import SharedMemoryExchange
from sempre.workers.gpu.exchange import MEMORY_BYTES, GpuExchange
from sempre.workers.gpu.peer_memory import PeerMemory, open_peer_memory

Result = TypeVar("Result")
CPU = torch.device("cpu")


def in_processes(size: int, action: Callable[..., Result], *arguments: Any) -> list[Result]:
    """`action(rank, size, *arguments)` of each rank, in a process of its own; raises the first one's error."""
    with ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(action, rank, size, *arguments) for rank in range(size)]]


def mapped_memory(folder: Path, size: int, num_bytes: int = MEMORY_BYTES) -> PeerMemory:
    """That of each rank, a file."""
    memories = []
    for rank in range(size):
        descriptor = os.open(folder / f"memory-{rank}", os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, num_bytes)
        memories.append(torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8))
        os.close(descriptor)
    return PeerMemory(memories)


def host_exchange(folder: Path, rank: int, size: int) -> SharedMemoryExchange:
    descriptor = os.open(folder / "host", os.O_RDWR | os.O_CREAT)
    return SharedMemoryExchange(descriptor, rank, size, patience_s=300.0)


def exchange_of(folder: Path, rank: int, size: int, patience_s: float = 300.0) -> GpuExchange:
    """The exchange of one rank, whose device becomes the current one."""
    host = host_exchange(folder, rank, size)
    if torch.cuda.is_available():
        device = device_of(rank)
        torch.cuda.set_device(device)
        memory = open_peer_memory(host, rank, size, MEMORY_BYTES, device)
        return GpuExchange(memory, rank, device, host, patience_s=patience_s)
    return GpuExchange(mapped_memory(folder, size), rank, CPU, host, patience_s=patience_s)


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else CPU
