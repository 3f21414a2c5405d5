"""Linear layers from hidden states to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Tensors
from sempre.workers.parallel import pieces
from sempre.workers.tensor_source import Parameter

EMBEDDING = "model.embed_tokens.weight"


class Head(Linear):
    """x [S, H] → logits float32 [S, V]. A rank computes those of some tokens, and gets those of all."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        self._parallel = parallel = build.parallel
        self._vocab_size = vocab_size
        self._own = own = parallel.own_rows(vocab_size)
        super().__init__(build, {"lm_head": len(own)}, hidden_size, use=Use.LOGITS)
        if len(own) < vocab_size:
            self.take("lm_head", torch.arange(own.start, own.stop, dtype=torch.int64, device="cpu"), of=vocab_size)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        exchange, parallel = self._parallel.exchange, self._parallel
        if parallel.devices is not None:
            return parallel.devices.gather(super().into, x, parallel.cut(self._vocab_size), out)
        if exchange is None:
            return super().into(x, out)
        shares = [parallel.own_rows(self._vocab_size, rank) for rank in range(parallel.size)]
        for rows in pieces(exchange, x.shape[0], len(shares[0])):
            count = rows.stop - rows.start
            slots = exchange.slots(count, len(shares[0])).flatten(1)
            parts = [slot[: count * len(share)].view(count, -1) for slot, share in zip(slots, shares, strict=True)]
            super().into(x[rows], parts[parallel.rank])
            exchange.wait()
            for share, part in zip(shares, parts, strict=True):
                out[rows, share.start : share.stop] = part
        return out


class TiedHead(Head):
    """Logits from the embedding's table, which is already loaded; reads no tensor of its own."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        super().__init__(build, embedding.num_rows, embedding.width)
        self._embedding = embedding

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        return iter(())

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = self.kernel.pack(self._embedding.weight, None)


class TokenLinear(Linear):
    """The logits of a few tokens: rows of the vocabulary's head, or of the embedding's table."""

    def __init__(self, build: Build, tokens: Sequence[int], head_shape: tuple[int, int], *, tied: bool) -> None:
        super().__init__(build, {"score": len(tokens)}, head_shape[1], use=Use.LOGITS)
        self._tokens = list(tokens)
        self._head_shape = head_shape
        self._tied = tied

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        if not self._tied:
            yield "lm_head.weight", Parameter(self._head_shape)

    def load(self, path: str, tensors: Tensors) -> None:
        stored = tensors.read(EMBEDDING if self._tied else "lm_head.weight")
        self.weight = self.kernel.pack(tensors.matrix(stored[self._tokens]).contiguous(), None)
