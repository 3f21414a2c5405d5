"""Structs that both protocols share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from sempre.ipc.config import PoolingKind, PoolingTask, Similarity

PROTOCOL_VERSION = 2

# msgpack itself bounds an integer at 2**64 - 1; msgspec cannot state that bound
Uint64 = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class Message(Struct, tag=True, frozen=True, array_like=True, kw_only=True):
    """Base of everything on a wire: [tag, field, field, …] in msgpack."""


class Data(Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Base of the parts of a message (untagged). The garbage collector need not look at them: they form no cycles, and
    a step has thousands."""


NOT_READY = "NotReady"
"""Error type of a row that is to be computed again in a later step."""


class ErrorInfo(Data, frozen=True, kw_only=True):
    """An exception in transit: its type's name, text, where it was raised, and the facts its class carries."""

    type: str
    message: str
    rank: int | None = None
    traceback: str = ""
    facts: dict[str, str | int | None] = {}


class RngDigests(Data, frozen=True, kw_only=True):
    """SHA-256 (hex) of the state of each global generator of one process."""

    python_random: str
    numpy_random: str
    torch_cpu: str
    torch_accelerator: str = ""


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent by either side of a link every `heartbeat_interval_s`, also while the sender computes."""

    rank: int | None = None
    steps_done: int = 0
    resident_bytes: int | None = None
    """the sender's memory in RAM, if known"""
    stack: str = ""
    """of the main thread of a worker that has worked on one command for several intervals"""


class Refused(Message, frozen=True, kw_only=True):
    """The receiver's answer to a frame that it could not accept; the sender's process is not affected."""

    error: ErrorInfo


class ReasoningSpec(Data, frozen=True, kw_only=True):
    """How an output may reason before it answers.

    `start` and `end` are the tags; `begins_inside`: the prompt has opened the reasoning. `grammar`, in llguidance's
    format, constrains an output that begins with `start`, instead of the one for an answer without reasoning. After
    `budget` tokens of reasoning (None: no limit) the next ones are `end_token_ids`.
    """

    start: str
    end: str
    end_token_ids: list[TokenId]
    begins_inside: bool = False
    grammar: str | None = None
    budget: NonNegative | None = None


class PromptCandidates(Data, frozen=True, kw_only=True):
    """Token ids to score in place of a prompt's tokens: `width` for each but the first 1 + `start` of them.

    `token_ids`: int32 little-endian, row by row; -1 is no token, of probability 0.
    """

    start: NonNegative
    width: Positive
    token_ids: bytes

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) // (4 * self.width)


class SamplingSpec(Data, frozen=True, kw_only=True):
    """Sampling parameters as the worker needs them: validated, resolved, in token ids.

    Greedy is `temperature == 0`. `top_k == 0` is off. `stop_token_ids` end the request with that id as the reason;
    `eos_token_ids` end it with reason None and are empty under `ignore_eos`. `logprobs` is None (off), k best, or -1
    for the whole vocabulary; the same for `prompt_logprobs`. `grammar`, in llguidance's format, constrains the output's
    text; one of `eos_token_ids` ends it, even before `min_tokens` where the text can only end. `logprob_token_ids` are
    reported beside the `logprobs`, `prompt_candidates` beside the prompt's own tokens.
    """

    max_tokens: Positive
    min_tokens: NonNegative = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: NonNegative = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[TokenId, float] = {}
    allowed_token_ids: list[TokenId] | None = None
    bad_words_token_ids: list[list[TokenId]] = []
    eos_token_ids: list[TokenId] = []
    stop_token_ids: list[TokenId] = []
    logprobs: Annotated[int, Meta(ge=-1)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    grammar: str | None = None
    reasoning: ReasoningSpec | None = None
    logprob_token_ids: list[TokenId] = []
    prompt_candidates: PromptCandidates | None = None

    @property
    def first_scored_token(self) -> int | None:
        """The first prompt token that is scored; None if none is."""
        if self.prompt_logprobs is not None:
            return 1  # nothing predicts the first one
        return None if self.prompt_candidates is None else 1 + self.prompt_candidates.start

    @property
    def depends_on_output(self) -> bool:
        """Whether the tokens allowed next depend on the previous ones, which must be known first."""
        return self.grammar is not None or self.reasoning is not None


class PoolingSpec(Data, frozen=True, kw_only=True):
    """What a pooling model returns for a prompt: its vector's first `dimensions` elements (None: all) with norm 1, or
    the probabilities of its labels; without `use_activation` the vector or the scores as they are."""

    dimensions: Positive | None = None
    use_activation: bool = True


class AdapterSpec(Data, frozen=True, kw_only=True):
    """A low-rank adapter: the user's name for it, its folder, and SHA-256 (hex) of its files, which identifies it."""

    name: str
    path: str
    digest: str


class PoolingModel(Data, frozen=True, kw_only=True):
    """What a pooling model computes of a prompt: a vector of `width` elements, or a probability for each label.

    `kind`: of its last token, of its first one, or the mean over all tokens. `dimensions`: the lengths to which vectors
    may be cut; empty: any if `is_matryoshka`, else none. `prompts` by name come before texts that ask for them, that of
    `default_prompt_name` before all others.
    """

    task: PoolingTask
    kind: PoolingKind
    width: Positive
    use_activation: bool = True
    """unless a request says otherwise"""
    is_matryoshka: bool = False
    dimensions: list[Positive] = []
    labels: list[str] = []
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    similarity: Similarity = "cosine"


class LogprobRows(Data, frozen=True, kw_only=True):
    """Log-probabilities of `num_rows` positions, `width` columns each, as packed little-endian arrays.

    Column 0 is the token that was sampled (or is in the prompt), columns 1…k the k best in descending order (value,
    then lowest id), the last L those of `logprob_token_ids`. `token_ids` int32, `logprobs` float32, `ranks` int32, the
    1-based vocabulary rank of column 0 (one per row), `listed_ranks` int32 those of the last L columns. Of a prompt,
    `candidates` are the log-probabilities of its PromptCandidates, for those of the rows that have any. Packed bytes
    keep the float32 bits and cost no float parsing.
    """

    num_rows: NonNegative
    width: Positive
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    listed_ranks: bytes = b""
    candidates: bytes = b""
