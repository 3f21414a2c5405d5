"""`LLM.llm_engine`: the settings that users of vLLM read from there; all of it is read-only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sempre.engine.frontend.frontend import Frontend
from sempre.ipc.config import EngineConfig, LogprobsMode
from sempre.ipc.messages import EngineReady
from sempre.ipc.model_files import read_json_object

if TYPE_CHECKING:
    from sempre.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelView:
    """The model in use."""

    model: str
    served_model_name: str
    tokenizer: str
    seed: int
    dtype: str
    quantization: str | None
    max_model_len: int
    max_logprobs: int
    logprobs_mode: LogprobsMode
    hf_config: SimpleNamespace
    """the fields of config.json"""
    vocab_size: int

    def get_vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.vocab_size


@dataclass(frozen=True)
class CacheView:
    """The KV cache of one worker."""

    block_size: int
    num_gpu_blocks: int
    """number of blocks, on a CPU as well"""
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    cache_dtype: str
    """the setting kv_cache_dtype"""


@dataclass(frozen=True)
class SchedulerView:
    """The limits of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str


@dataclass(frozen=True)
class ParallelView:
    """The workers."""

    tensor_parallel_size: int
    data_parallel_size: int
    world_size: int
    worker_pids: list[int]
    """process ids at the start, in the order of ranks"""
    pipeline_parallel_size: int


class EngineView:
    """The settings in use, under vLLM's names."""

    def __init__(self, frontend: Frontend, ready: EngineReady) -> None:
        config: EngineConfig = frontend.config
        self._tokenizer = frontend.tokenizer
        self._processor = frontend.processor
        self.model_config = ModelView(
            model=config.model,
            served_model_name=frontend.served_model_name,
            tokenizer=frontend.tokenizer_name,
            seed=config.seed,
            dtype=frontend.bits.get("dtype", config.dtype),
            quantization=config.quantization,
            max_model_len=ready.max_model_len,
            max_logprobs=config.max_logprobs,
            logprobs_mode=config.logprobs_mode,
            hf_config=_hf_config(config),
            vocab_size=ready.vocab_size,
        )
        self.cache_config = CacheView(
            ready.block_size,
            ready.num_blocks,
            config.enable_prefix_caching,
            config.gpu_memory_utilization,
            config.kv_cache_dtype,
        )
        self.scheduler_config = SchedulerView(
            ready.max_num_seqs, ready.max_num_batched_tokens, ready.max_model_len, config.scheduling_policy
        )
        self.parallel_config = ParallelView(
            config.tensor_parallel_size,
            config.data_parallel_size,
            ready.world_size,
            list(ready.worker_pids),
            config.pipeline_parallel_size,
        )

    @property
    def vllm_config(self) -> EngineView:
        """The same settings under another name of vLLM."""
        return self

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use."""
        return self._tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer in use."""
        return self._tokenizer

    def get_num_unfinished_requests(self) -> int:
        """Return the number of requests that have not ended."""
        return self._processor.num_unfinished

    def has_unfinished_requests(self) -> bool:
        """Return whether any request has not ended."""
        return self._processor.num_unfinished > 0

    def get_model_config(self) -> ModelView:
        """Return `model_config`."""
        return self.model_config

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"llm_engine has no {name!r} here: it has settings (model_config, cache_config, scheduler_config, "
                "parallel_config, get_tokenizer()) and the number of unfinished requests. Everything else is a method "
                "of LLM: collective_rpc, get_metrics, reset_prefix_cache, shutdown."
            )


def _hf_config(config: EngineConfig) -> SimpleNamespace:
    path = Path(config.model_path) / "config.json"
    return SimpleNamespace(**(read_json_object(path) if path.exists() else {}))
