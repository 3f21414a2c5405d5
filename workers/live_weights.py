"""New weights for a model that is being served: read and checked beside the old ones, then copied over them.

Whatever computes with a model's tensors (runners, CUDA graphs, drafters) keeps them, so only their values change. A set
that does not fit is refused before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sempre.ipc.config import with_weights
from sempre.ipc.errors import ConfigError, ProtocolError
from sempre.ipc.gguf_index import GGUF_INDEX_FILE
from sempre.workers.backend import LoadedModel
from sempre.workers.layers.module import Module
from sempre.workers.loading import Loaded, Placement, load_model
from sempre.workers.tensor_source import mismatch


class LiveWeights:
    """The weights that one model may be given next."""

    def __init__(self) -> None:
        self._staged: Loaded | None = None

    def stage(self, model: LoadedModel, placement: Placement, path: str) -> str:
        """Load the weights in a folder beside those of `model`; return their digest. Raises TensorMismatch, ModelError,
        or ConfigError where they cannot be replaced."""
        self._staged = None
        if (Path(model.config.weights_folder) / GGUF_INDEX_FILE).exists():
            raise _refused("a checkpoint of safetensors, found a GGUF file, whose weights cannot be replaced", path)
        config = with_weights(model.config, path)
        try:
            staged = load_model(config, model.spec, model.kernel, placement, model.parallel)
        except torch.OutOfMemoryError as error:
            raise _refused(f"memory for both the old and the new weights: {error}", path) from error
        _check_alike(model.model, staged.model)
        self._staged = staged
        return staged.facts.digest

    def commit(self, model: LoadedModel) -> LoadedModel:
        """Copy the staged weights over those of `model`; return it with their facts."""
        staged, self._staged = self._staged, None
        if staged is None:
            raise ProtocolError("worker: expected staged weights before they are committed, found none.")
        for (_, module), (_, new) in zip(model.model.walk(), staged.model.walk(), strict=True):
            for tensor, values in zip(module.own_tensors(), new.own_tensors(), strict=True):
                tensor.copy_(values)
        return replace(model, weights=replace(model.weights, digest=staged.facts.digest))

    def drop(self) -> None:
        """Forget the staged weights."""
        self._staged = None


def weight_methods(
    current: Callable[[], LoadedModel], placement: Callable[[], Placement], take: Callable[[LoadedModel], None]
) -> dict[str, Callable[..., object]]:
    """Methods that a coordinator calls, for the worker's `current` model; `take` is told what it has become."""
    weights = LiveWeights()
    return {
        "_stage_weights": lambda path: weights.stage(current(), placement(), path),
        "_commit_weights": lambda: take(weights.commit(current())),
        "_drop_weights": weights.drop,
    }


def _check_alike(model: Module, staged: Module) -> None:
    """Raise TensorMismatch unless each tensor is stored as before."""
    for (path, module), (_, new) in zip(model.walk(), staged.walk(), strict=True):
        for tensor, values in zip(module.own_tensors(), new.own_tensors(), strict=True):
            if tensor.dtype is not values.dtype or tensor.shape != values.shape:
                raise mismatch(path, f"{_form(tensor)} in memory, as now", _form(values))


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refused(expected: str, path: str) -> ConfigError:
    return ConfigError(f"update_weights: expected {expected}.", parameter="path", value=path)
