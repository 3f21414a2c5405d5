"""States of requests on one worker: how many slots fit beside the KV cache, their memory, and digests of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
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
# of a sequence that a model drafts for: the state after all known tokens, and that after the last draft
DRAFT_SLOTS = 2


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
    is_draft: bool = False
    """whether the model drafts: its sequences have two slots each, and there are no others"""

    @property
    def num_own(self) -> int:
        """Slots that are the requests' own."""
        of_each = DRAFT_SLOTS if self.is_draft else 1
        return of_each * self.max_num_seqs if self.slot_bytes else 0

    @property
    def own_bytes(self) -> int:
        """Of these."""
        return self.num_own * self.slot_bytes

    def num_slots(self, memory_bytes: int, origin: str) -> int:
        """How many slots to have of a memory that is also the KV cache's; `origin` says where its size comes from.

        Raises ConfigError with the sums when not every request can have one.
        """
        if not self.slot_bytes:
            return 0
        if self.own_bytes > memory_bytes:
            kept = "two states" if self.is_draft else "states"
            raise ConfigError(
                f"max_num_seqs: {self.max_num_seqs} requests keep {kept} of {self.slot_bytes} bytes each ="
                f" {self.own_bytes} bytes, beside keys and values; {origin} = {memory_bytes} bytes. Lower max_num_seqs"
                " or raise kv_cache_memory_bytes.",
                parameter="max_num_seqs",
                value=self.max_num_seqs,
            )
        if self.is_draft:
            return self.num_own
        fitting = int((memory_bytes - self.own_bytes) * SPARE_SHARE) // self.slot_bytes
        # at least one, where it fits: a token that is sampled late is computed again from the state before it
        most = MOST_SPARE * self.max_num_seqs if self.uses_spare else 1
        return self.num_own + min(fitting, most)


class LayerTensors:
    """Tensors of each layer, whose first dimension counts blocks or slots: what the caches have in common."""

    def __init__(self, layers: Iterable[Sequence[torch.Tensor]]) -> None:
        self._tensors = [list(tensors) for tensors in layers]

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.nbytes) for tensors in self._tensors for tensor in tensors)

    def clear(self, places: Sequence[int]) -> None:
        """Zero these blocks or slots in every layer, as they were when allocated."""
        for tensors in self._tensors:
            for place in places:
                for tensor in tensors:
                    tensor[place].zero_()

    def digest(self, places: Sequence[int]) -> str:
        """SHA-256 over these blocks or slots in every layer, in the order given: all that is kept there."""
        digest = hashlib.sha256()
        for tensors in self._tensors:
            for place in places:
                for tensor in tensors:
                    digest.update(tensor_bytes(tensor[place]))
        return digest.hexdigest()


class StateCache(LayerTensors):
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
        super().__init__((layer.recurrent, layer.conv) for layer in self.layers.values())
