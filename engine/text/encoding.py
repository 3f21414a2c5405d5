"""Token ids of one text or several, under the names of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sempre.ipc.errors import ConfigError

Padding = bool | Literal["longest", "max_length", "do_not_pad"]


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask`, as keys or as attributes: of one text, or a list of them."""

    @property
    def input_ids(self) -> Any:
        """Token ids."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 for each token, 0 for padding."""
        return self["attention_mask"]


def padded(
    rows: Sequence[list[int]], padding: Padding, max_length: int | None, *, pad_id: int | None, side: str
) -> BatchEncoding:
    """Return the rows with their masks, padded to one length if `padding` is set. Raises ConfigError."""
    length = None
    if padding in (True, "longest"):
        length = max(map(len, rows), default=0)
    elif padding == "max_length":
        length = max_length
    elif padding not in (False, "do_not_pad"):
        raise ConfigError(
            f"padding must be True, False, 'longest' or 'max_length', got {padding!r}.", parameter="padding"
        )
    if length is None:
        return BatchEncoding(input_ids=list(rows), attention_mask=[[1] * len(row) for row in rows])
    if pad_id is None:
        raise ConfigError("padding needs a pad_token, and this tokenizer has none.", parameter="padding", value=padding)
    found = BatchEncoding(input_ids=[], attention_mask=[])
    for row in rows:
        mask, missing = [1] * len(row), max(0, length - len(row))
        ids, zeros = [pad_id] * missing, [0] * missing
        found["input_ids"].append(ids + row if side == "left" else row + ids)
        found["attention_mask"].append(zeros + mask if side == "left" else mask + zeros)
    return found
