"""Token ids to rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sempre.kernels.embedding import embed
from sempre.workers.layers.module import Build, Module, Scratch, Tensors
from sempre.workers.parallel import WrittenRows, pieces
from sempre.workers.tensor_source import Parameter


class Embedding(Module):
    """A table [V, H], in the dtype of matrices. A rank has some of its rows."""

    weight: torch.Tensor

    def __init__(self, build: Build, num_rows: int, width: int, *, role: str = "residual") -> None:
        """`role` names the result buffer."""
        self.num_rows = num_rows
        self.width = width
        self.own = build.parallel.own_rows(num_rows)
        self._exchange = build.parallel.exchange
        self._devices = build.parallel.devices
        self._cut = build.parallel.cut(num_rows)
        self._role = role

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield path + ".weight", Parameter((self.num_rows, self.width))

    def load(self, path: str, tensors: Tensors) -> None:
        # a copy: a view would keep the whole file mapped
        stored = tensors.matrix(tensors.read(path + ".weight")[self.own.start : self.own.stop])
        self.weight = stored.clone(memory_format=torch.contiguous_format)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield self.weight

    def allocate(self, scratch: Scratch) -> None:
        self._out = scratch.rows(self._role, self.width)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] → [T, H], in the buffer of this role: the residual stream of the step."""
        out = self._out.first(token_ids.shape[0])
        if self._devices is not None:
            return self._devices.embed(token_ids, self.weight, self._cut, out)
        if self._exchange is None:
            return embed(token_ids, self.weight, out)
        if ((token_ids < 0) | (token_ids >= self.num_rows)).any():
            raise IndexError(f"embed: token ids {token_ids.tolist()} are outside a table of {self.num_rows} rows")
        for rows in pieces(self._exchange, len(token_ids), self.width):
            # each rank writes the rows that it has
            shared = self._exchange.slots(rows.stop - rows.start, self.width)[0]
            own = token_ids[rows] - self.own.start
            places = ((own >= 0) & (own < len(self.own))).nonzero().view(-1)
            found = torch.empty(len(places), self.width, dtype=out.dtype, device=out.device)
            shared.index_copy_(0, places, embed(own[places], self.weight, found))
            self._exchange.wait(WrittenRows(shared, places))
            out[rows].copy_(shared)
        return out
