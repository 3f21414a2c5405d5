"""Hidden states and samples from stage to stage, between hosts."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from sempre.ipc.errors import ProtocolError
from sempre.ipc.rank_links import RankLinks

_SHAPE = struct.Struct("<QQ?")


class LinkedStages:
    """`stages.StageLink` between processes of several hosts; the links count frames, so that none is mistaken for
    another."""

    def __init__(self, links: RankLinks, rank: int, ranks: Sequence[int], *, patience_s: float) -> None:
        """`ranks` are those of this rank's place in all stages, `rank` among them. One that is waited for longer than
        `patience_s` has failed."""
        self._links = links
        self._rank = rank
        self._ranks = list(ranks)
        self._own = self._ranks.index(rank)
        self._patience_s = patience_s

    def pass_on(self, branch: torch.Tensor | None, residual: torch.Tensor) -> None:
        """See `StageLink`."""
        shape = _SHAPE.pack(*residual.shape, branch is not None)
        states = [residual] if branch is None else [residual, branch]
        self._links.send(self._ranks[self._own + 1], [shape, *map(_bytes, states)])

    def take_over(self, branch: torch.Tensor, residual: torch.Tensor) -> bool:
        """See `StageLink`."""
        sender = self._ranks[self._own - 1]
        shape, *states = self._links.receive(sender, self._patience_s)
        rows, width, has_branch = _SHAPE.unpack(shape)
        expected = [residual.nbytes] * (1 + has_branch)
        if (rows, width) != residual.shape or [len(state) for state in states] != expected:
            raise ProtocolError(
                f"rank {self._rank}: expected hidden states of {residual.shape[0]} rows and width {residual.shape[1]}"
                f" from rank {sender}, found {rows} and {width}, of {[len(state) for state in states]} bytes"
            )
        for state, out in zip(states, (residual, branch), strict=False):
            _flat(out).numpy()[...] = np.frombuffer(state, np.uint8)
        return bool(has_branch)

    def report(self, outcome: bytes) -> None:
        """See `StageLink`."""
        for rank in self._ranks[:-1]:
            self._links.send(rank, [outcome])

    def has_report(self, wait_s: float) -> bool:
        """See `StageLink`."""
        return self._links.has_frame(self._ranks[-1], wait_s)

    def next_report(self) -> bytes:
        """See `StageLink`."""
        [outcome] = self._links.receive(self._ranks[-1], self._patience_s)
        return outcome


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.view(-1).view(torch.uint8)


def _bytes(states: torch.Tensor) -> memoryview:
    return _flat(states.contiguous()).numpy().data
