"""The public names, and that importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sempre.engine

PUBLIC = {
    "LLM",
    "LoRARequest",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RelevanceOutput",
    "ScoringRequestOutput",
    "ConfigError",
    "CoordinatorDied",
    "Counter",
    "EngineArgs",
    "EngineConfig",
    "EngineDeadError",
    "EngineHealth",
    "EngineUnhealthy",
    "Gauge",
    "Histogram",
    "InvarianceError",
    "Logprob",
    "Metric",
    "ModelError",
    "PromptType",
    "RankReport",
    "RecordError",
    "RequestCrashed",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
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
}


def test_public_names() -> None:
    assert set(sempre.engine.__all__) == PUBLIC
    assert len(sempre.engine.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_resolves(name: str) -> None:
    assert getattr(sempre.engine, name) is not None
    assert name in dir(sempre.engine)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        _ = sempre.engine.LMM  # type: ignore[attr-defined]


def modules_after(statement: str) -> set[str]:
    probe = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_import_is_cheap() -> None:
    assert modules_after("import sempre.engine").isdisjoint({"torch", "numpy", "msgspec", "zmq", "tokenizers"})


def test_an_engine_is_imported_with_two_libraries() -> None:
    """Each other one would delay the start of every program that imports the engine."""
    others = modules_after("from sempre.engine import LLM, SamplingParams") - modules_after("pass")
    assert others - sys.stdlib_module_names == {"sempre", "msgspec", "tokenizers", "typing_extensions"}


@pytest.mark.parametrize("name", ["LLM", "AsyncLLM", "SamplingParams", "engine_config"])
def test_no_name_imports_torch(name: str) -> None:
    assert modules_after(f"from sempre.engine import {name}").isdisjoint({"torch", "numba", "transformers"})
