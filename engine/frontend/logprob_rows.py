"""Log-probabilities on their way to the user: unpacked as they arrive, or kept packed until they are written.

Packed, an entry takes 8 bytes, unpacked over 100. A server holds them for clients that may read slowly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, overload

from sempre.engine.flat_logprobs import FlatLogprobs
from sempre.engine.outputs import Logprob
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import LogprobRows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Row = dict[int, Logprob]


class PackedRows(Sequence[Row]):
    """Rows of one sequence, unpacked one by one when they are read."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer, entries have no text."""
        self._tokenizer = tokenizer
        self._num_listed = 0
        self.num_rows = self.width = 0
        self.token_ids, self.logprobs, self.ranks, self.listed_ranks = (bytearray() for _ in range(4))

    def add(self, rows: LogprobRows, count: int) -> None:
        """Add the first `count` rows. Raises MessageMalformed if the packed sizes are inconsistent."""
        num_listed = _checked(rows)
        if not self.num_rows:
            self.width, self._num_listed = rows.width, num_listed
        elif (rows.width, num_listed) != (self.width, self._num_listed):
            expected, found = (self.width, self._num_listed), (rows.width, num_listed)
            raise MessageMalformed(f"LogprobRows.width: expected {expected} columns, found {found}.", field="width")
        self.num_rows += count
        self.token_ids += rows.token_ids[: 4 * count * rows.width]
        self.logprobs += rows.logprobs[: 4 * count * rows.width]
        self.ranks += rows.ranks[: 4 * count]
        self.listed_ranks += rows.listed_ranks[: 4 * count * num_listed]

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(self.num_rows)[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return _unpacked(self, places, self._num_listed, self._tokenizer)


class AfterFirst(Sequence[Row | None]):
    """The rows of a prompt: None for its first token, which nothing predicts, then those of the others."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return 1 + len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row | None]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row | None] | None:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return self._rows[places - 1] if places else None


def after_first(rows: Sequence[Row]) -> Sequence[Row | None]:
    """A prompt's rows, given in the form of `rows`, which has none for the first token."""
    if isinstance(rows, FlatLogprobs):
        flat = FlatLogprobs()
        flat.extend([None, *rows])
        return flat
    return [None, *rows] if isinstance(rows, list) else AfterFirst(rows)


class RowBuffer:
    """The rows of one sequence that have arrived and have not been taken."""

    def __init__(self, tokenizer: Tokenizer | None, empty: Callable[[], PackedRows | FlatLogprobs | list[Row]]) -> None:
        """`empty` makes what the rows are given in."""
        self._tokenizer = tokenizer
        self._empty = empty
        self._rows = empty()
        self.num_entries = 0
        """log-probabilities in these rows"""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: LogprobRows, count: int) -> None:
        """Add the first `count` rows. Raises MessageMalformed if the packed sizes are inconsistent."""
        if isinstance(self._rows, PackedRows):
            self._rows.add(rows, count)
        else:
            num_listed = _checked(rows)
            self._rows.extend([_unpacked(rows, row, num_listed, self._tokenizer) for row in range(count)])
        self.num_entries += count * rows.width

    def everything(self) -> Sequence[Row]:
        """Return all rows, and keep them."""
        return self._rows if isinstance(self._rows, PackedRows) else self._rows[:]

    def take(self) -> Sequence[Row]:
        """Return all rows, and forget them."""
        taken, self._rows = self._rows, self._empty()
        self.num_entries = 0
        return taken


class CandidateScores:
    """The log-probabilities of a prompt's candidates, as they arrive."""

    def __init__(self, candidates: Sequence[Sequence[int]]) -> None:
        self._shape = len(candidates), max(map(len, candidates))
        self._packed = bytearray()

    @property
    def num_entries(self) -> int:
        """log-probabilities that have arrived and have not been taken"""
        return len(self._packed) // 4

    @property
    def is_complete(self) -> bool:
        return self.num_entries == self._shape[0] * self._shape[1]

    def add(self, rows: LogprobRows) -> None:
        """Add those of some prompt tokens."""
        self._packed += rows.candidates

    def matrix(self) -> npt.NDArray[np.float32] | None:
        """All of them, [scored tokens, candidates]; None if some are missing."""
        if not self.is_complete:
            return None
        import numpy as np  # which most programs that use an engine need not wait for

        return np.frombuffer(self._packed, "<f4").astype(np.float32).reshape(self._shape)

    def clear(self) -> None:
        """Forget all."""
        self._packed = bytearray()


def floats(field: str, data: bytes) -> list[float]:
    """Unpack float32 values. Raises MessageMalformed naming the field if they are not whole."""
    if len(data) % 4:
        raise MessageMalformed(f"{field}: expected a multiple of 4 bytes, found {len(data)}.", field=field)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def own_logprobs(rows: LogprobRows, count: int) -> list[float]:
    """The log-probability of each row's own token, for the first `count` rows."""
    return [struct.unpack_from("<f", rows.logprobs, 4 * row * rows.width)[0] for row in range(count)]


def _unpacked(rows: LogprobRows | PackedRows, row: int, num_listed: int, tokenizer: Tokenizer | None) -> Row:
    """The row's own token first, then the k best, then those requested by id, each once.

    Every `logprob` is exactly the worker's float32.
    """
    width = rows.width
    token_ids = struct.unpack_from(f"<{width}i", rows.token_ids, 4 * row * width)
    logprobs = struct.unpack_from(f"<{width}f", rows.logprobs, 4 * row * width)
    own_rank = struct.unpack_from("<i", rows.ranks, 4 * row)
    listed_ranks = struct.unpack_from(f"<{num_listed}i", rows.listed_ranks, 4 * row * num_listed)
    ranks = (*own_rank, *range(1, width - num_listed), *listed_ranks)
    texts = repeat(None, width) if tokenizer is None else map(tokenizer.token_text, token_ids)
    each = list(map(Logprob, logprobs, ranks, texts))
    entries = dict(zip(token_ids, each, strict=True))
    if len(entries) < width:
        # of equal ids, the first counts
        entries.update(zip(reversed(token_ids), reversed(each), strict=True))
    return entries


def _checked(rows: LogprobRows) -> int:
    """The number of columns requested by id. Raises MessageMalformed if the sizes are inconsistent."""
    num_rows, num_entries = rows.num_rows, rows.num_rows * rows.width
    num_listed = len(rows.listed_ranks) // (4 * num_rows) if num_rows else 0
    expected = (
        ("token_ids", rows.token_ids, num_entries),
        ("logprobs", rows.logprobs, num_entries),
        ("ranks", rows.ranks, num_rows),
        ("listed_ranks", rows.listed_ranks, num_rows * num_listed),
    )
    for field, data, count in expected:
        if len(data) != 4 * count:
            text = f"LogprobRows.{field}: expected {4 * count} bytes, found {len(data)}."
            raise MessageMalformed(text, field=field)
    return num_listed
