"""Which requests hold the same cache blocks in whole splits of keys, kept up to date as their tables grow.

# N slots (one per known request), S splits of a table, R requests of a step
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sempre.ipc.messages import WorkerConfig
from sempre.kernels.attention.gpu import SHARED_LEN
from sempre.kernels.attention.gpu_tiles import SPLIT
from sempre.kernels.attention.shared_prefixes import LEAST_SAVED, PrefixArrays, group_requests, most_shared_splits
from sempre.workers.steps import Int32, Int64

# of the self-test, and more
_LEAST_LEN = 2048


def workspace_len(config: WorkerConfig, max_model_len: int) -> int:
    """Keys that attention's workspace is allocated for: with a prefix cache, so many that all shared splits of a step
    have room."""
    return max(max_model_len, SHARED_LEN if config.enable_prefix_caching else _LEAST_LEN)


class StepPrefixes(NamedTuple):
    """What the requests of a step share."""

    arrays: PrefixArrays
    max_splits: int
    is_new: bool
    """whether they are not those of the last step that shared any"""


class SharedSplits:
    """Numbers for the contents of splits: two requests have the same number where their tables name the same blocks.

    Without requests that share a split, a step costs nothing here.
    """

    def __init__(self, *, num_slots: int, table_width: int, block_size: int) -> None:
        self._blocks = SPLIT // block_size
        self._ids: Int32 = np.zeros((num_slots, table_width // self._blocks), np.int32)
        self._held = [0] * num_slots
        # by number: the blocks that it stands for, and how many tables have them; 0 stands for none
        self._keys: list[bytes] = [b""]
        self._holders = [0]
        self._free: list[int] = []
        self._numbers: dict[bytes, int] = {}
        self._num_shared = 0
        self._step: tuple[object, StepPrefixes | None] = (None, None)

    def extend(self, slot: int, table: Int32, start: int, end: int) -> None:
        """Blocks [start, end) of the slot's table are new; those after them are not in use."""
        first, last = start // self._blocks, end // self._blocks
        if slot >= len(self._held):
            self._grow(slot)
        if first == last and self._held[slot] <= first:
            return
        self._forget(slot, first)
        for split in range(first, last):
            # the place is part of the key: a number stands for one split
            blocks = table[split * self._blocks : (split + 1) * self._blocks]
            self._ids[slot, split] = self._hold(split.to_bytes(4, "little") + blocks.tobytes())
        self._held[slot] = last

    @property
    def has_shared(self) -> bool:
        """Whether any two known requests share a split."""
        return self._num_shared > 0

    def remove(self, slot: int) -> None:
        """The slot's request has gone."""
        if slot < len(self._held):
            self._forget(slot, 0)

    def of_step(self, slots: Int64, contexts: Int64, num_requests: int, max_context_len: int) -> StepPrefixes | None:
        """What decoding requests, whose contexts end at `contexts`, share in a step padded to `num_requests`; 0 for
        requests of several rows."""
        if not self._num_shared:
            return None
        whole = contexts // SPLIT
        key = (slots.tobytes(), whole.tobytes(), num_requests, max_context_len)
        if key != self._step[0]:
            self._step = key, self._group(slots, whole, num_requests, -(-max_context_len // SPLIT))
            return self._step[1]
        return None if self._step[1] is None else self._step[1]._replace(is_new=False)

    def _group(self, slots: Int64, whole: Int64, num_requests: int, num_splits: int) -> StepPrefixes | None:
        """`whole` [R]: splits all of whose keys the request sees."""
        max_splits = most_shared_splits(num_requests, num_splits)
        ids = self._ids[slots, : min(max_splits, self._ids.shape[1])]
        seen = np.arange(ids.shape[1]) < whole[:, None]
        arrays = group_requests(np.where(seen, ids, 0), num_requests, least_saved=LEAST_SAVED)
        return None if arrays is None else StepPrefixes(arrays, max_splits, is_new=True)

    def _grow(self, slot: int) -> None:
        more = max(slot + 1, 2 * len(self._ids)) - len(self._ids)
        self._ids = np.concatenate([self._ids, np.zeros((more, self._ids.shape[1]), np.int32)])
        self._held += [0] * more

    def _hold(self, key: bytes) -> int:
        number = self._numbers.get(key)
        if number is None:
            if not self._free:
                self._free.append(len(self._keys))
                self._keys.append(b"")
                self._holders.append(0)
            number = self._numbers[key] = self._free.pop()
            self._keys[number] = key
        self._holders[number] += 1
        self._num_shared += self._holders[number] == 2
        return number

    def _forget(self, slot: int, first: int) -> None:
        """The slot's splits from `first` on."""
        self._step = (None, None)
        for number in self._ids[slot, first : self._held[slot]].tolist():
            self._holders[number] -= 1
            self._num_shared -= self._holders[number] == 1
            if not self._holders[number]:
                del self._numbers[self._keys[number]]
                self._free.append(number)
        self._ids[slot, first : self._held[slot]] = 0
        self._held[slot] = min(self._held[slot], first)
