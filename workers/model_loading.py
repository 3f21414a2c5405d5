"""The models of a worker: its own, and the one that it drafts with, as its settings and its device want them."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from sempre.ipc.config import BLOCK_SIZES
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import WorkerConfig
from sempre.workers.adapters.store import AdapterStore
from sempre.workers.backend import Backend, LoadedModel, ModelSetup
from sempre.workers.layers.linear_kernel import linear_kernel
from sempre.workers.loading import load_model
from sempre.workers.model_length import max_model_len
from sempre.workers.models.pooling import PoolingSettings
from sempre.workers.models.registry import load_spec


def model_setup(config: WorkerConfig, backend: Backend) -> ModelSetup:
    """What is known before the weights are loaded. Raises ConfigError, ModelError."""
    is_draft = config.role == "draft"
    settings = PoolingSettings(*(("generate",) if is_draft else (config.runner, config.convert, config.pooler_config)))
    spec = load_spec(Path(config.model_path), settings)
    if spec.pooling is not None and config.speculative_config is not None:
        raise ConfigError(
            "speculative_config: nothing is drafted for a model that pools. Leave it out.",
            parameter="speculative_config",
        )
    if spec.pooling is not None and config.enable_lora:
        raise ConfigError("enable_lora: a model that pools has no adapters. Leave it out.", parameter="enable_lora")
    if is_draft and any(spec.layer_states) and backend.placement.device.type != "cpu":
        raise ConfigError(
            f"speculative_config: the draft model {config.model_path} ({spec.architecture}) has layers that keep"
            f" states; on {backend.placement.device.type} expected one whose layers all have attention. Choose another"
            " draft model, or method ngram or suffix.",
            parameter="speculative_config",
            value=config.model_path,
        )
    return ModelSetup(
        config,
        spec,
        linear_kernel(config.numerics),
        max_model_len=max_model_len(config, spec),
        block_size=config.block_size or BLOCK_SIZES[backend.placement.device.type][0],
        max_num_batched_tokens=config.max_num_batched_tokens or backend.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs or backend.default_max_num_seqs(config, spec),
    )


def load_with_adapters(setup: ModelSetup, backend: Backend) -> LoadedModel:
    """Load a model, with room for its adapters. Raises the errors of `load_model`."""
    model, weights = load_model(setup.config, setup.spec, setup.kernel, backend.placement, setup.parallel)
    serves_adapters = setup.config.enable_lora and setup.config.role == "target"
    adapters = AdapterStore(setup.config, model, weights.activations) if serves_adapters else None
    return LoadedModel(**vars(setup), model=model, weights=weights, adapters=adapters)


def load_draft_model(target: LoadedModel, backend: Backend) -> LoadedModel | None:
    """The model that a target's worker drafts with, if any; only the last stage does. Raises ConfigError for other
    tokens."""
    config = target.config
    folder = config.colocated_draft_model
    if folder is None or not target.parallel.stage.is_last:
        return None
    draft_config = replace(
        config,
        role="draft",
        model_path=folder,
        weights_path=None,
        speculative_config=None,
        quantization=None,
        numerics_profile="single",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        max_model_len=target.max_model_len,
    )
    draft = load_with_adapters(model_setup(draft_config, backend), backend)
    found, expected = draft.spec.vocab_size, target.spec.vocab_size
    if found != expected:
        raise ConfigError(
            f"speculative_config: the draft model {folder} has a vocabulary of {found} tokens, and the"
            f" model {config.model_path} one of {expected}; both must have the same tokens.",
            parameter="speculative_config",
            value=folder,
        )
    return draft
