"""The longest sequence of a worker: what the config asks for, the model supports, and the KV cache holds."""

from __future__ import annotations

import logging
from dataclasses import replace

from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import WorkerConfig
from sempre.workers.backend import LoadedModel
from sempre.workers.models.config import ModelSpec

logger = logging.getLogger(__name__)


def fitted(loaded: LoadedModel, num_blocks: int) -> LoadedModel:
    """With a shorter `max_model_len` where the config leaves it open and the cache is too small for the model's."""
    held = num_blocks * loaded.block_size
    if loaded.config.max_model_len is not None or held >= loaded.max_model_len:
        return loaded
    logger.warning(
        "max_model_len is %d tokens, what the KV cache holds; the model could take %d", held, loaded.max_model_len
    )
    return replace(loaded, max_model_len=held)


def max_model_len(config: WorkerConfig, spec: ModelSpec) -> int:
    """Tokens of prompt and output. Raises ConfigError for more than the model supports."""
    wanted = config.max_model_len
    if wanted is None:
        return spec.default_positions
    if config.role == "draft":
        # longer sequences continue without drafts
        return min(wanted, spec.most_positions)
    if not 1 <= wanted <= spec.most_positions:
        stretched = "" if spec.most_positions == spec.max_position_embeddings else " times the factor of its rope"
        raise ConfigError(
            f"max_model_len: expected 1 to {spec.most_positions} (max_position_embeddings of the model{stretched}),"
            f" found {wanted}.",
            parameter="max_model_len",
            value=wanted,
        )
    return wanted
