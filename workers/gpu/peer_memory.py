"""Memory of the GPUs of one replica that every rank can read and write."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch

from sempre.ipc.errors import ConfigError, StartupError
from sempre.workers.parallel import Exchange

# of what a rank tells the others once, in float32 words
_WORDS = 1024
_LENGTH_BYTES = 4


class _Handle(msgspec.Struct, array_like=True):
    """How another process opens a tensor's memory, in the order in which PyTorch gives and takes it."""

    device: int
    handle: bytes
    size: int
    offset: int
    ref_counter: bytes
    ref_counter_offset: int
    event: bytes
    waits_for_event: bool


class PeerMemory(NamedTuple):
    """`ranks`: the memory of each rank, bytes; that of the own rank is a part of this device's."""

    ranks: list[torch.Tensor]


def share(host: Exchange, rank: int, size: int, message: bytes) -> list[bytes]:
    """What each rank says, in their order; up to 4,092 bytes each."""
    slots = host.slots(1, _WORDS).view(torch.uint8).view(size, -1)
    room = slots.shape[1] - _LENGTH_BYTES
    assert len(message) <= room, f"{len(message)} bytes do not fit {room}"
    framed = len(message).to_bytes(_LENGTH_BYTES, "little") + message
    slots[rank, : len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
    host.wait()
    said = [bytes(slot.numpy()) for slot in slots]
    return [one[_LENGTH_BYTES:][: int.from_bytes(one[:_LENGTH_BYTES], "little")] for one in said]


def open_peer_memory(host: Exchange, rank: int, size: int, num_bytes: int, device: torch.device) -> PeerMemory:
    """Allocate `num_bytes` of zeros and open those of the other ranks, which do the same. Raises ConfigError for GPUs
    that cannot reach each other, and StartupError."""
    own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    handle = _Handle(*own.untyped_storage()._share_cuda_())  # type: ignore[no-untyped-call]
    told = [
        msgspec.msgpack.decode(said, type=_Handle) for said in share(host, rank, size, msgspec.msgpack.encode(handle))
    ]
    for other, peer in enumerate(told):
        if other != rank:
            _check_peer(rank, device, other, peer.device)
    ranks = [own if other == rank else _open(peer, other, device, num_bytes) for other, peer in enumerate(told)]
    host.wait()
    return PeerMemory(ranks)


def _check_peer(rank: int, device: torch.device, other: int, other_device: int) -> None:
    own_device = device.index or 0
    if own_device == other_device:
        raise ConfigError(
            f"tensor_parallel_size: expected a GPU for each rank, found ranks {rank} and {other} on GPU {own_device}.",
            parameter="tensor_parallel_size",
        )
    if not torch.cuda.can_device_access_peer(own_device, other_device):
        raise ConfigError(
            f"tensor_parallel_size: expected GPUs that reach each other's memory, found that GPU {own_device} does not"
            f" reach GPU {other_device} (`nvidia-smi topo -p2p r`). Use other GPUs, or data_parallel_size.",
            parameter="tensor_parallel_size",
        )


def _open(peer: _Handle, rank: int, device: torch.device, num_bytes: int) -> torch.Tensor:
    """The memory of another process, mapped for this rank's own device. Whoever shared it has waited for it."""
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index or 0,
            peer.handle,
            peer.size,
            peer.offset,
            peer.ref_counter,
            peer.ref_counter_offset,
            peer.event,
            False,
        )
    except RuntimeError as error:
        raise StartupError(
            f"tensor_parallel_size: the memory of rank {rank}, on GPU {peer.device}, cannot be opened from GPU"
            f" {device.index or 0}: {error}",
            rank=rank,
        ) from error
    memory = torch.empty(0, dtype=torch.uint8, device=device)
    memory.set_(storage)
    assert memory.numel() == num_bytes, f"expected {num_bytes} bytes of rank {rank}, found {memory.numel()}"
    return memory
