"""How a rank of a replica on several hosts reaches the others: by links, where they share no memory."""

from __future__ import annotations

from dataclasses import dataclass

from sempre.ipc.rank_links import RankLinks
from sempre.workers.cpu.linked_exchange import LinkedExchange
from sempre.workers.cpu.linked_stages import LinkedStages
from sempre.workers.stages import ALL_LAYERS, Stage


@dataclass(frozen=True)
class LinkedReplica:
    """Those of one rank: `size` ranks in each of `num_stages` stages, as `ReplicaFile` numbers them."""

    links: RankLinks
    """to the replica's other ranks"""
    size: int
    num_stages: int
    rank: int
    """of the replica"""
    first: int = 0
    """the replica's first rank, as the links number them"""
    patience_s: float = 120.0
    """after which a rank that is waited for has failed"""

    def exchange(self) -> LinkedExchange | None:
        """With the other ranks of the stage; None: there are none."""
        if self.size == 1:
            return None
        start = self.first + self.rank // self.size * self.size
        return LinkedExchange(
            self.links, self.first + self.rank, range(start, start + self.size), patience_s=self.patience_s
        )

    def stage(self) -> Stage:
        """This rank's, linked to the others."""
        if self.num_stages == 1:
            return ALL_LAYERS
        own, number = divmod(self.rank, self.size)
        ranks = [self.first + stage * self.size + number for stage in range(self.num_stages)]
        link = LinkedStages(self.links, self.first + self.rank, ranks, patience_s=self.patience_s)
        return Stage(own, self.num_stages, link)
