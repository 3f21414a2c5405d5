"""Sempre: LLM inference whose outputs are reproducible bit for bit.

    from sempre.engine import LLM, SamplingParams

    with LLM("tiny") as llm:
        print(llm.generate("It is a truth", SamplingParams(max_tokens=32, seed=1))[0].outputs[0].text)

Names are imported on first use, so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sempre.engine.version import __version__

if TYPE_CHECKING:
    from sempre.engine.adapters import LoRARequest
    from sempre.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from sempre.engine.arguments import engine_config
    from sempre.engine.async_llm import AsyncLLM
    from sempre.engine.frontend.beam_search import BeamSearchParams
    from sempre.engine.frontend.prompts import PromptType, TextPrompt, TokensPrompt
    from sempre.engine.health import EngineHealth, RankReport, WorkerHealth
    from sempre.engine.llm import LLM
    from sempre.engine.metrics import Counter, Gauge, Histogram, Metric
    from sempre.engine.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoringOutput,
    )
    from sempre.engine.pooling import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingParams,
        PoolingRequestOutput,
        RelevanceOutput,
        ScoringRequestOutput,
    )
    from sempre.engine.proof.frames import to_frame
    from sempre.engine.proof.saved_outputs import load_outputs, save_outputs
    from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
    from sempre.engine.structured_outputs import StructuredOutputsParams
    from sempre.ipc.config import EngineConfig
    from sempre.ipc.errors import (
        ConfigError,
        CoordinatorDied,
        EngineDeadError,
        EngineUnhealthy,
        InvarianceError,
        ModelError,
        RecordError,
        RequestCrashed,
        RequestError,
        SeedMismatch,
        SempreError,
        StartupError,
        WorkerDied,
    )

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ConfigError",
    "CoordinatorDied",
    "Counter",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "EngineDeadError",
    "EngineHealth",
    "EngineUnhealthy",
    "Gauge",
    "Histogram",
    "InvarianceError",
    "LoRARequest",
    "Logprob",
    "Metric",
    "ModelError",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RankReport",
    "RecordError",
    "RelevanceOutput",
    "RequestCrashed",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "SeedMismatch",
    "SempreError",
    "StartupError",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "WorkerDied",
    "WorkerHealth",
    "__version__",
    "engine_config",
    "load_outputs",
    "save_outputs",
    "to_frame",
]

_NAMES_BY_MODULE = {
    "sempre.engine.adapters": ("LoRARequest",),
    "sempre.engine.arg_utils": ("AsyncEngineArgs", "EngineArgs"),
    "sempre.engine.arguments": ("engine_config",),
    "sempre.engine.async_llm": ("AsyncLLM",),
    "sempre.ipc.config": ("EngineConfig",),
    "sempre.engine.health": ("EngineHealth", "RankReport", "WorkerHealth"),
    "sempre.engine.llm": ("LLM",),
    "sempre.engine.metrics": ("Counter", "Gauge", "Histogram", "Metric"),
    "sempre.engine.outputs": (
        "BeamSearchOutput",
        "BeamSearchSequence",
        "CompletionOutput",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
        "ScoringOutput",
    ),
    "sempre.engine.frontend.beam_search": ("BeamSearchParams",),
    "sempre.engine.frontend.prompts": ("PromptType", "TextPrompt", "TokensPrompt"),
    "sempre.engine.pooling": (
        "ClassificationOutput",
        "ClassificationRequestOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "PoolingOutput",
        "PoolingParams",
        "PoolingRequestOutput",
        "RelevanceOutput",
        "ScoringRequestOutput",
    ),
    "sempre.engine.proof.frames": ("to_frame",),
    "sempre.engine.proof.saved_outputs": ("load_outputs", "save_outputs"),
    "sempre.engine.sampling_params": ("RequestOutputKind", "SamplingParams"),
    "sempre.engine.structured_outputs": ("StructuredOutputsParams",),
    "sempre.ipc.errors": (
        "ConfigError",
        "CoordinatorDied",
        "EngineDeadError",
        "EngineUnhealthy",
        "InvarianceError",
        "ModelError",
        "RecordError",
        "RequestCrashed",
        "RequestError",
        "SeedMismatch",
        "SempreError",
        "StartupError",
        "WorkerDied",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
