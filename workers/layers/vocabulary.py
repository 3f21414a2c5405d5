"""Linear layers from hidden states to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sempre.workers.layers.embedding import Embedding
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Tensors
from sempre.workers.tensor_source import Parameter


class TiedLinear(Linear):
    """Logits from the embedding's table, which is already loaded; reads no tensor of its own."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        super().__init__(build, {"lm_head": embedding.num_rows}, embedding.width, use=Use.LOGITS)
        self._embedding = embedding

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        return iter(())

    def load(self, path: str, tensors: Tensors) -> None:
        self.weight = self.kernel.pack(self._embedding.weight, None)


class TokenLinear(Linear):
    """The logits of a few tokens: rows of the vocabulary's head, or of the embedding's table, which is loaded."""

    def __init__(
        self, build: Build, tokens: Sequence[int], head_shape: tuple[int, int], table: Embedding | None
    ) -> None:
        super().__init__(build, {"score": len(tokens)}, head_shape[1], use=Use.LOGITS)
        self._tokens = list(tokens)
        self._head_shape = head_shape
        self._table = table

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        if self._table is None:
            yield "lm_head.weight", Parameter(self._head_shape)

    def load(self, path: str, tensors: Tensors) -> None:
        if self._table is None:
            rows = tensors.matrix(tensors.read("lm_head.weight")[self._tokens])
        else:
            rows = self._table.weight[self._tokens]
        self.weight = self.kernel.pack(rows.contiguous(), None)
