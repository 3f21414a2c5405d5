"""What the ranks of one replica pass to each other, between the GPUs of a host.

A rank's memory has flags (`kernels.exchange.gpu`), two halves that take turns for what it passes on, and an area for
results that others computed. One meeting for each exchange is enough: whoever writes a half again has met the others
since, and they had read the half before. Graphs are captured with fixed addresses, so the turns begin anew with every
`begin`, which waits until all ranks are past the exchanges before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sempre.ipc.errors import EngineUnhealthy
from sempre.kernels.embedding import embed
from sempre.kernels.exchange.contract import Cut, Norm
from sempre.kernels.exchange.gpu import (
    FLAG_BYTES,
    PLACES,
    Peers,
    gather_columns,
    gather_rows,
    meet,
    sum_rows,
    sum_shares,
)
from sempre.kernels.linear import GpuLinearWeight, partial_linear
from sempre.workers.gpu.peer_memory import PeerMemory, share
from sempre.workers.parallel import Exchange, Multiply

AREA_BYTES = 64 << 20
MEMORY_BYTES = FLAG_BYTES + 3 * AREA_BYTES
_RESULTS = FLAG_BYTES + 2 * AREA_BYTES
# partial sums of a rank beyond which each rank adds its share of the rows only
MOST_BYTES_ADDED_BY_ALL = 8 << 20
# a look takes at least as long
_LOOK_S = 0.3e-6
_MOST_LOOKS = (1 << 30) - 1


class GpuExchange:
    """`parallel.DeviceExchange` between GPUs of one host."""

    def __init__(
        self, memory: PeerMemory, rank: int, device: torch.device, host: Exchange, *, patience_s: float = 120.0
    ) -> None:
        """`host` is memory that the ranks share on the host. A rank that lets the others wait for `patience_s`, or
        somewhat longer, has failed."""
        self._memory = memory
        self._own = memory.ranks[rank]
        self._host = host
        self._patience_s = patience_s
        self._failure = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self.peers = Peers(
            rank,
            torch.tensor([one.data_ptr() for one in memory.ranks], dtype=torch.int64, device=device),
            torch.zeros(PLACES + 1, dtype=torch.int32, device=device),
            self._failure,
            min(_MOST_LOOKS, int(patience_s / _LOOK_S)),
        )
        self._number = 0

    def begin(self) -> None:
        """See `DeviceExchange`."""
        meet(self.peers)
        self._number = 0

    def sum(self, x: torch.Tensor, weight: GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
        """See `DeviceExchange`."""
        for rows in self._pieces(x.shape[0], out.shape[1]):
            self._sum(x[rows], weight, out[rows], None)
        return out

    def sum_and_norm(self, x: torch.Tensor, weight: GpuLinearWeight, norm: Norm, out: torch.Tensor) -> torch.Tensor:
        """See `DeviceExchange`."""
        for rows in self._pieces(x.shape[0], out.shape[1]):
            self._sum(x[rows], weight, out[rows], norm._replace(residual=norm.residual[rows]))
        return out

    def _sum(self, x: torch.Tensor, weight: GpuLinearWeight, out: torch.Tensor, norm: Norm | None) -> None:
        start = self._next_half()
        own = self._rows(start, x.shape[0], out.shape[1], torch.float32)
        partial_linear(x, weight, own)
        if own.nbytes > MOST_BYTES_ADDED_BY_ALL:
            sum_shares(self.peers, start, _RESULTS, weight, out, norm)
        else:
            sum_rows(self.peers, start, weight, out, norm)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, cut: Cut, out: torch.Tensor) -> torch.Tensor:
        """See `DeviceExchange`."""
        self.begin()
        first = self.peers.rank * cut.each + min(self.peers.rank, cut.more)
        for rows in self._pieces(len(token_ids), out.shape[1]):
            start, ids = self._next_half(), token_ids[rows]
            # rows of NaN for tokens of other ranks, which nobody reads
            embed(ids - first, table, self._rows(start, len(ids), out.shape[1], out.dtype))
            gather_rows(self.peers, start, ids, cut, out[rows])
        return out

    def gather(self, multiply: Multiply, x: torch.Tensor, cut: Cut, out: torch.Tensor) -> torch.Tensor:
        """See `DeviceExchange`."""
        self.begin()
        columns = cut.each + (self.peers.rank < cut.more)
        for rows in self._pieces(x.shape[0], cut.each + 1):
            start, own = self._next_half(), x[rows]
            multiply(own, self._rows(start, own.shape[0], columns, torch.float32))
            gather_columns(self.peers, start, cut, out[rows])
        return out

    def smallest(self, number: int) -> int:
        """The smallest of the numbers that the ranks say; all call this at the same point."""
        said = share(self._host, self.peers.rank, self.peers.size, str(number).encode())
        return min(int(one) for one in said)

    def check(self) -> None:
        """Raise EngineUnhealthy, naming a rank that others waited for in vain; after a wait for the device."""
        if missing := int(self._failure[0]):
            raise EngineUnhealthy(
                f"rank {self.peers.rank}: an exchange between GPUs: expected rank {missing - 1} within"
                f" {self._patience_s:g} s, found it missing",
                rank=missing - 1,
                cause="missing",
            )

    def _next_half(self) -> int:
        """Where the half begins whose turn it is."""
        self._number += 1
        return FLAG_BYTES + self._number % 2 * AREA_BYTES

    def _rows(self, start: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] at a byte of this rank's memory."""
        return self._own[start : start + rows * width * dtype.itemsize].view(dtype).view(rows, width)

    def _pieces(self, rows: int, width: int) -> Iterator[slice]:
        """As many rows at a time as a half has room for in float32."""
        most = max(1, AREA_BYTES // (width * torch.float32.itemsize))
        for start in range(0, rows, most):
            yield slice(start, min(start + most, rows))
