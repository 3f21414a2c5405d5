"""What a user gets back, with vLLM's field names plus `seed`, `fingerprint` and `error`.

All of it works with `dataclasses.asdict` (or `to_dict`, which is the same), and the result with `json.dumps`; but the
matrix `prompt_token_id_logprobs` is an array in the one, and lists in the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from sempre.engine.adapters import LoRARequest
from sempre.engine.metrics import dataclass_view
from sempre.engine.proof.json_values import json_ready

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Matrix = npt.NDArray[np.float32]
else:
    _Matrix = Any  # hints that are read at run time need no numpy


@dataclass_view
class Logprob(Struct, frozen=True, gc=False):
    """One token's natural log-probability (before temperature and penalties), exactly the worker's float32."""

    logprob: float
    rank: int | None = None
    """1-based rank in the vocabulary, by value, then lowest token id."""
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Host times in seconds since the epoch, for information only: nothing depends on them."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = None
    """Seconds until a step was sent for one of its sequences."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    # fields of vLLM's outputs that this engine does not use
    lora_request: ClassVar[None] = None

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the sampled tokens' log-probabilities; None unless `logprobs` were asked for."""
    logprobs: Sequence[dict[int, Logprob]] | None
    """Per token: the sampled token first, then the k best or those of `logprob_token_ids`."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort`, `error`, or None while unfinished."""
    stop_reason: int | str | None = None
    """The stop string or token id; None for the end-of-sequence token."""
    seed: int = 0
    """The seed used: the same request with this seed and n=1 gives the same tokens."""
    error: str | None = None
    """What went wrong, when `finish_reason` is `error`."""
    receipt: str | None = None
    """How to make this completion again, as one line (see `engine.proof.statement`), if it was recorded."""

    def finished(self) -> bool:
        """Whether this completion has ended."""
        return self.finish_reason is not None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


@dataclass(slots=True)
class RequestOutput:
    """All completions of one request."""

    encoder_prompt: ClassVar[None] = None
    encoder_prompt_token_ids: ClassVar[None] = None
    kv_transfer_params: ClassVar[None] = None

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None
    """Per prompt token, None for the first; None unless asked for."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache."""
    fingerprint: str = ""
    """Digest of everything that the output depends on, apart from seed and request."""
    lora_request: LoRARequest | None = None
    """The adapter of the request."""
    pooled: list[float] | None = None
    """Of a model that pools: what `embed`, `classify` and `score` are made of."""
    prompt_token_id_logprobs: _Matrix | None = None
    """Of `prompt_logprob_token_ids`, [scored prompt tokens, ids]; -inf where a row has no more ids."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RequestOutput):
            return NotImplemented
        names = [field.name for field in fields(self) if field.name != "prompt_token_id_logprobs"]
        one, two = self.prompt_token_id_logprobs, other.prompt_token_id_logprobs
        same = one is two if one is None or two is None else (one.shape, one.tobytes()) == (two.shape, two.tobytes())
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        values = asdict(self)
        if self.prompt_token_id_logprobs is not None:
            values["prompt_token_id_logprobs"] = self.prompt_token_id_logprobs.tolist()
        return values

    def to_json(self) -> str:
        """Return everything as JSON on one line; a log-probability reads back to the same bits.

        Infinities and NaN, which JSON lacks, are the strings `Infinity`, `-Infinity` and `NaN`.
        """
        return json.dumps(json_ready(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def _repr_html_(self) -> str:
        """Return the form that a notebook shows: tokens coloured by probability."""
        from sempre.engine.proof.token_html import output_html

        return output_html(self)


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam, prompt included."""

    lora_request: ClassVar[None] = None

    tokens: list[int]
    """Prompt and output; without the end token, unless `include_stop_str_in_output`."""
    logprobs: list[dict[int, Logprob]]
    """Per output token, also for an end token that is left out: those that were compared."""
    cum_logprob: float
    """Sum of the log-probabilities of the output, end token included, added in order."""
    text: str
    """Prompt and output."""
    finish_reason: str
    """`stop` or `length`."""
    stop_reason: int | None = None
    """The end token."""
    receipt: str | None = None
    """On one line, if the engine records (`record=…`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


@dataclass(slots=True)
class ScoringOutput:
    """How probable the model finds a given prompt."""

    token_ids: list[int]
    logprobs: list[float | None] = field(default_factory=list)
    """Natural log-probability of each token after the ones before it; None for the first."""
    total: float = 0.0
    """Sum of the log-probabilities, added in order."""
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        return asdict(self)
