"""States of requests on one worker: how many slots fit beside the KV cache, their memory, and digests of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sempre.ipc.errors import ConfigError
from sempre.kernels.states import LayerState, StateShape, allocate_layer_state
from sempre.workers.tensor_source import CPU, tensor_bytes

# of the memory that is left when each request has a slot, this share is for further ones: a snapshot takes as much as
# the keys and values of some thousand tokens, and makes a cached prefix of any length resumable
SPARE_SHARE = 0.25
# most further slots for each request
MOST_SPARE = 3


def slot_bytes(shapes: Sequence[StateShape | None], activations: torch.dtype) -> int:
    """Bytes of one slot: a state of every layer that keeps one."""
    return sum(shape.nbytes(activations) for shape in shapes if shape is not None)


class CacheSizes(NamedTuple):
    """What a worker's memory holds."""

    num_blocks: int
    """of the KV cache"""
    num_state_slots: int = 0


class StateNeeds(NamedTuple):
    """What the states of a model ask of a worker's memory."""

    slot_bytes: int
    """0: the model keeps no states"""
    max_num_seqs: int
    uses_spare: bool
    """whether there are snapshots or drafts, which take further slots"""

    @property
    def own_bytes(self) -> int:
        """Of one slot for each request."""
        return self.max_num_seqs * self.slot_bytes

    def num_slots(self, memory_bytes: int, origin: str) -> int:
        """How many slots to have of a memory that is also the KV cache's; `origin` says where its size comes from.

        Raises ConfigError with the sums when not every request can have one.
        """
        if not self.slot_bytes:
            return 0
        if self.own_bytes > memory_bytes:
            raise ConfigError(
                f"max_num_seqs: {self.max_num_seqs} requests keep states of {self.slot_bytes} bytes each ="
                f" {self.own_bytes} bytes, beside keys and values; {origin} = {memory_bytes} bytes. Lower max_num_seqs"
                " or raise kv_cache_memory_bytes.",
                parameter="max_num_seqs",
                value=self.max_num_seqs,
            )
        fitting = int((memory_bytes - self.own_bytes) * SPARE_SHARE) // self.slot_bytes
        # at least one, where it fits: a token that is sampled late is computed again from the state before it
        most = MOST_SPARE * self.max_num_seqs if self.uses_spare else 1
        return self.max_num_seqs + min(fitting, most)


class StateCache:
    """One state per slot in each layer that keeps states. Memory is resident once a slot is written."""

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        num_slots: int,
        activations: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.num_slots = num_slots
        self.layers: dict[int, LayerState] = {
            index: allocate_layer_state(shape, num_slots, activations, device)
            for index, shape in enumerate(shapes)
            if shape is not None
        }
        """by number of the layer"""

    @property
    def nbytes(self) -> int:
        return sum(int(layer.recurrent.nbytes + layer.conv.nbytes) for layer in self.layers.values())

    def clear(self, slots: Sequence[int]) -> None:
        """Zero the slots, as they were when allocated."""
        for layer in self.layers.values():
            for slot in slots:
                layer.recurrent[slot].zero_()
                layer.conv[slot].zero_()

    def digest(self, slots: Sequence[int]) -> str:
        """SHA-256 over the slots' states in every layer, in the order given."""
        digest = hashlib.sha256()
        for layer in self.layers.values():
            for slot in slots:
                for tensor in (layer.recurrent[slot], layer.conv[slot]):
                    digest.update(tensor_bytes(tensor))
        return digest.hexdigest()
