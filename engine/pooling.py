"""Parameters and outputs of models that pool, with vLLM's names plus `fingerprint`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from sempre.engine.parameter_checks import integer, refusal, shown
from sempre.ipc.config import PoolingTask

Outputs = TypeVar("Outputs")
_SIDES = ("left", "right")
_FLAGS = (None, True, False)


@dataclass(slots=True)
class PoolingParams:
    """What is wanted of pooled prompts. Values are checked when the object is made; raises ConfigError naming one."""

    dimensions: int | None = None
    """Only the first elements of an embedding, if the model was trained for it (matryoshka)."""
    use_activation: bool | None = None
    """Norm 1 for embeddings, probabilities for classes; None is the model's default, mostly True."""
    truncate_prompt_tokens: int | None = None
    """Cut longer prompts to this many tokens; -1: to what the model takes."""
    truncation_side: Literal["left", "right"] | None = None
    """Where they are cut; None: left."""
    prompt_name: str | None = None
    """The stored prompt (sentence-transformers) to put before each text; None: the model's default, if it has one; "":
    none."""
    task: PoolingTask | None = None
    """What the model is expected to do; None: whatever it does."""

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            self.dimensions = integer("dimensions", self.dimensions)
            if self.dimensions < 1:
                raise refusal("dimensions", self.dimensions, f"must be at least 1, got {self.dimensions}.")
        if self.truncate_prompt_tokens is not None:
            most = self.truncate_prompt_tokens = integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
            if most < 1 and most != -1:
                raise refusal("truncate_prompt_tokens", most, f"must be at least 1, or -1, got {shown(most)}.")
        if not any(self.use_activation is value for value in _FLAGS):
            value = self.use_activation
            raise refusal("use_activation", value, f"must be True, False or None, got {shown(value)}.")
        if self.truncation_side not in (None, *_SIDES):
            side = self.truncation_side
            raise refusal("truncation_side", side, f"must be 'left' or 'right', got {shown(side)}.")
        if not isinstance(self.prompt_name, str | None):
            name = self.prompt_name
            raise refusal("prompt_name", name, f"must be the name of a stored prompt, got {shown(name)}.")
        if self.task not in (None, "embed", "classify"):
            raise refusal("task", self.task, f"must be 'embed' or 'classify', got {shown(self.task)}.")


@dataclass(slots=True)
class PoolingOutput:
    """What the model returned for a prompt."""

    data: list[float]


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt as a vector, each element exactly the worker's float32."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """The vector's length."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """The probability of each label, in the order of the model's config."""

    probs: list[float]
    label: str = ""
    """The most probable label; of equals the first."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.probs)


@dataclass(slots=True)
class RelevanceOutput:
    """How well a document answers a query."""

    score: float


@dataclass(slots=True)
class PooledOutput(Generic[Outputs]):
    """The result of one prompt, or of one pair of query and document."""

    request_id: str
    outputs: Outputs
    prompt_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    finished: bool = True
    fingerprint: str = ""
    """Digest of everything that the result depends on, apart from the request."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


class PoolingRequestOutput(PooledOutput[PoolingOutput]):
    """Of `encode`."""


class EmbeddingRequestOutput(PooledOutput[EmbeddingOutput]):
    """Of `embed`."""


class ClassificationRequestOutput(PooledOutput[ClassificationOutput]):
    """Of `classify`."""


class ScoringRequestOutput(PooledOutput[RelevanceOutput]):
    """Of `score` with a query and a document."""
