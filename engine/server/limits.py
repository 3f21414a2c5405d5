"""Size limits of one request and the depth of its JSON, checked before it is processed.

Generation may take long, but the work before it must not, since all other requests wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np

from sempre.engine.sampling_params import SamplingParams
from sempre.engine.server.errors import APIError, BadRequest

MAX_FORM_BYTES = 256 * 1024
"""Maximum bytes of the requested output form; the grammar built from it has its own limit."""
MAX_TOOLS_BYTES = 1 << 20
MAX_TEMPLATE_CHARACTERS = 64 * 1024
MAX_PROMPT_TOKENS = 1 << 18
"""Maximum tokens of all prompts of a request, unless a single one may be longer."""

MAX_COPIED_VALUES = 1 << 21
"""Maximum token ids and biases of a request, counted for each of its sequences, which copy them."""

# field → (maximum entries, maximum characters of all entries)
_TEXTS = {"stop": (256, 16 * 1024), "bad_words": (128, 8 * 1024)}
_ENTRIES = {"stop_token_ids": 1024, "logprob_token_ids": 1024, "logit_bias": 4096, "allowed_token_ids": 1 << 17}
_ENTRIES |= {"prompt_logprob_token_ids": 1 << 15}
_ENTRIES |= {"messages": 1 << 14, "input": 1 << 14, "documents": 1 << 14, "chat_template_kwargs": 1024}
_BYTES = {
    "structured_outputs": MAX_FORM_BYTES,
    "response_format": MAX_FORM_BYTES,
    "tools": MAX_TOOLS_BYTES,
}
_CHARACTERS = {"cache_salt": 1024, "chat_template": MAX_TEMPLATE_CHARACTERS}
MAX_DEPTH = 100
MAX_CONTAINERS = 50_000
"""Maximum objects and lists: each is an allocation and takes time to process later."""
MAX_VALUES = 300_000
"""Maximum entries and members, unless one prompt may have more token ids."""
MAX_MEMBERS = 50_000
_CHUNK = 1 << 16
_QUOTE, _COMMA, _COLON = b'",:'


def check_sizes(request: msgspec.Struct) -> None:
    """Raise BadRequest naming the field that is too large, APIError (413) for an output form or tools."""
    for name, (entries, characters) in _TEXTS.items():
        value = getattr(request, name, None)
        texts: Sequence[str] = [value] if isinstance(value, str) else value or ()
        check_entries(name, texts, entries)
        if sum(map(len, texts)) > characters:
            raise BadRequest(f"{name} may have at most {characters} characters in all.", param=name)
    for name, entries in _ENTRIES.items():
        check_entries(name, getattr(request, name, None) or (), entries)
    for name, characters in _CHARACTERS.items():
        if len(getattr(request, name, None) or "") > characters:
            raise BadRequest(f"{name} may have at most {characters} characters.", param=name)
    for name, most in _BYTES.items():
        _check_bytes(name, getattr(request, name, None), most)


def check_copies(params: SamplingParams, num_sequences: int) -> None:
    """Raise BadRequest for token rules that are too large for this many sequences."""
    sizes = {name: len(getattr(params, name) or ()) for name in ("allowed_token_ids", "logit_bias", "stop_token_ids")}
    sizes["prompt_logprob_token_ids"] = sum(map(len, params.prompt_logprob_token_ids or ()))
    for name, size in sizes.items():
        if size * num_sequences > MAX_COPIED_VALUES:
            raise BadRequest(
                f"{name} has {size} entries, and the request asks for {num_sequences} sequences (prompts times n); "
                f"together they may have at most {MAX_COPIED_VALUES}. Send several requests.",
                param=name,
            )


def check_entries(name: str, value: Collection[Any], most: int) -> None:
    """Raise BadRequest for a list or an object with more than `most` entries."""
    if len(value) > most:
        raise BadRequest(f"{name} may hold at most {most} entries, found {len(value)}.", param=name)


def _check_bytes(name: str, value: object, most: int) -> None:
    if value is not None and (size := len(msgspec.json.encode(value))) > most:
        raise APIError(413, f"{name} may have at most {most} bytes as JSON, found {size}.", param=name)


def check_structure(data: bytes, max_values: int = MAX_VALUES) -> None:
    """Raise BadRequest for JSON that is nested too deeply, APIError (413) for JSON with too many values.

    Linear, some milliseconds per megabyte; for invalid JSON the counts are meaningless, but the parser will refuse it.
    """
    # brackets, commas and colons are an upper bound, so most texts need no closer check
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH and data.count(b",") < MAX_MEMBERS // 2:
        return
    if b"\\" in data:
        data = data.replace(rb"\\", b"__").replace(rb"\"", b"__")
    in_string, depth = 0, 0
    containers = values = members = 0
    for start in range(0, len(data), _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        outside = ((np.cumsum(chunk == _QUOTE, dtype=np.uint8) + in_string) & 1) == 0
        in_string = int(not outside[-1])
        # "[" and "{" are 0x5B and 0x7B, "]" and "}" are 0x5D and 0x7D
        bracket = chunk & 0xDF
        opens = (bracket == 0x5B) & outside
        levels = depth + np.cumsum(opens.astype(np.int8) - ((bracket == 0x5D) & outside), dtype=np.int32)
        if int(levels.max()) > MAX_DEPTH:
            raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")
        depth = int(levels[-1])
        containers += int(np.count_nonzero(opens))
        values += int(np.count_nonzero((chunk == _COMMA) & outside))
        members += int(np.count_nonzero((chunk == _COLON) & outside))
        for count, most, what in (
            (containers, MAX_CONTAINERS, "objects and lists"),
            (values, max_values, "entries"),
            (members, MAX_MEMBERS, "members of objects"),
        ):
            if count > most:
                raise APIError(413, f"The body may hold at most {most} {what}.")
