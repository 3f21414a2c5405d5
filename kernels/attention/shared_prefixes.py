"""Which decoding requests of a step read the same keys, so that a GPU reads those once for all of them.

# R requests, S leading splits, E entries (a request of one row and one of its shared splits), N tiles
A split is shared when the block tables of several requests name the same blocks throughout it, and all of them see the
whole of it. A request's shared splits are its leading ones, without a gap; entries with the same split and blocks are a
group, and a tile is up to TILE_REQUESTS entries of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.checks import check_index

Int32 = npt.NDArray[np.int32]

# most entries of a step: their partials stand in the workspace
MAX_ENTRIES = 4096
TILE_REQUESTS = 64
# entries whose keys are not read again; fewer do not pay for the launch
LEAST_SAVED = 16


@dataclass(frozen=True)
class SharedPrefixes:
    """The shared splits of a step, on the device. ValueError unless the arrays are contiguous int32."""

    requests: torch.Tensor
    """int32 [E]: of each entry, those of a tile one after the other"""
    tiles: torch.Tensor
    """int32 [N, 3]: split, first entry, number of entries"""
    num_tiles: torch.Tensor
    """int32 [1]: those after them are not read"""
    counts: torch.Tensor
    """int32 [R]: the first so many splits of request r are in tiles; 0 for those of several rows, and padding"""
    max_splits: int
    """no request has more in tiles"""

    def __post_init__(self) -> None:
        for name in ("requests", "tiles", "num_tiles", "counts"):
            check_index("SharedPrefixes", name, getattr(self, name), torch.int32)


class PrefixArrays(NamedTuple):
    """The arrays of `SharedPrefixes` on the host, in its order."""

    requests: Int32
    tiles: Int32
    num_tiles: Int32
    counts: Int32

    def on_device(self, device: torch.device, max_splits: int) -> SharedPrefixes:
        """A copy of these arrays."""
        requests, tiles, num_tiles, counts = (torch.from_numpy(array).to(device) for array in self)
        return SharedPrefixes(requests, tiles, num_tiles, counts, max_splits)


def most_shared_splits(num_requests: int, max_splits: int) -> int:
    """How many leading splits of each request may be shared, of contexts of `max_splits`."""
    return min(MAX_ENTRIES // num_requests, max_splits)


def array_sizes(num_requests: int) -> list[tuple[int, ...]]:
    """Sizes of `PrefixArrays` for that many requests."""
    return [(MAX_ENTRIES,), (MAX_ENTRIES // 2, 3), (1,), (num_requests,)]


def group_requests(split_ids: Int32, num_requests: int, *, least_saved: int) -> PrefixArrays | None:
    """Arrays for `num_requests`; those beyond the ones with numbers are padding.

    `split_ids` int32 [R, S]: equal positive numbers in a column stand for the same blocks, others for splits that are
    not shared; numbers of two columns never agree. None where fewer than `least_saved` entries read keys that another
    one reads already.
    """
    leads, previous = split_ids > 0, -1
    # a split that only one request is left with is not shared; usually one round changes nothing
    while (total := int(leads.sum())) != previous:
        previous = total
        counts = np.bincount(split_ids[leads], minlength=1)
        leads = np.logical_and.accumulate(leads & (counts[np.where(leads, split_ids, 0)] > 1), axis=1)
    if total - np.unique(split_ids[leads]).size < max(least_saved, 1):
        return None
    splits, requests = np.nonzero(leads.T)
    ids = split_ids[requests, splits]
    order = np.argsort(ids, kind="stable")
    ids, splits, requests = ids[order], splits[order], requests[order]
    firsts = _tile_firsts(ids)
    arrays = PrefixArrays(*(np.zeros(size, np.int32) for size in array_sizes(num_requests)))
    arrays.num_tiles[0] = firsts.size
    arrays.counts[: len(split_ids)] = leads.sum(axis=1)
    arrays.requests[:total] = requests
    tiles = arrays.tiles[: firsts.size]
    tiles[:, 0], tiles[:, 1], tiles[:, 2] = splits[firsts], firsts, np.diff(firsts, append=total)
    return arrays


def _tile_firsts(ids: Int32) -> npt.NDArray[np.int64]:
    """Where a tile begins: at another number, and after every TILE_REQUESTS entries of one."""
    at = np.arange(ids.size)
    group_first = np.maximum.accumulate(np.where(np.diff(ids, prepend=-1) != 0, at, 0))
    return np.flatnonzero((at - group_first) % TILE_REQUESTS == 0)
