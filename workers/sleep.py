"""What a worker does without while its engine sleeps: its caches, and its weights, which it reads again from files."""

from __future__ import annotations

import gc
from dataclasses import dataclass, fields, replace

import torch

from sempre.ipc.config import with_weights
from sempre.ipc.errors import ConfigError, ModelError, RequestError
from sempre.workers.backend import LoadedModel, ModelSetup
from sempre.workers.host_memory import give_back_free_memory


@dataclass(frozen=True)
class SleepingModel:
    """A model whose weights are not in memory."""

    _setup: ModelSetup
    _digest: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> SleepingModel:
        """The model without its weights."""
        names = [field.name for field in fields(ModelSetup)]
        return cls(ModelSetup(**{name: getattr(loaded, name) for name in names}), loaded.weights.digest)

    def setup(self, weights_path: str | None) -> ModelSetup:
        """What to load; `weights_path` is the folder of the weights if it is not the model's own."""
        if weights_path is None:
            return self._setup
        return replace(self._setup, config=with_weights(self._setup.config, weights_path))

    def check(self, loaded: LoadedModel) -> None:
        """Raise ModelError if these are not the weights that fell asleep."""
        if loaded.weights.digest != self._digest:
            raise ModelError(
                f"wake_up: {loaded.config.weights_folder}: expected weights of digest {self._digest}, found"
                f" {loaded.weights.digest}: the files have changed while the engine slept. Restore them, or make a new"
                " engine."
            )


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a device whose memory a worker cannot give back."""
    if device.type != "cpu":
        raise ConfigError(
            f"sleep: expected level 0 (scheduling alone) on {device.type}, found one that gives back memory, which only"
            " workers on a CPU do. Use level 0, or shutdown() and a new engine: the same requests give the same bits.",
            parameter="level",
        )


def asleep(what: str) -> RequestError:
    """The error for a call that needs `what`."""
    return RequestError(f"the worker sleeps without its {what}; call wake_up() first.", parameter="method")


def give_back() -> None:
    """Return to the system what nothing refers to."""
    gc.collect()
    give_back_free_memory()
