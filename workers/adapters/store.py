"""The adapters of one worker: the loaded ones in host memory, and those in the slots of the model's layers.

Both forget the least recently used. What is loaded is known by the digest of its files, so the same adapter under two
names is loaded once, and one whose files have changed is another adapter. A step keeps all of its adapters' slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sempre.ipc.adapter_files import adapter_digest
from sempre.ipc.error_info import describe
from sempre.ipc.errors import ConfigError, MessageMalformed, ModelError, RequestError
from sempre.ipc.messages import AdapterSpec, ErrorInfo, WorkerConfig
from sempre.kernels.lora import LoraShape, LoraSlots, make_slots
from sempre.workers.adapters.peft import Adapter, adaptable_linears, read_adapter
from sempre.workers.input_batch import RequestState
from sempre.workers.models.base import CausalLM


class AdapterStore:
    """Of a model whose layers have slots."""

    def __init__(self, config: WorkerConfig, model: CausalLM, dtype: torch.dtype) -> None:
        """Give each linear layer slots; before the steps' memory is allocated. `dtype` is that of activations.

        Raises ConfigError for the numerics profile tree8 on a GPU, whose ranks do not pass inputs to each other.
        """
        if config.profile != "single" and model.device.type != "cpu":
            raise ConfigError(
                f"enable_lora: on {model.device.type} expected numerics_profile 'single' and tensor_parallel_size 1,"
                f" found {config.profile!r} and {config.tensor_parallel_size}; ranks share adapters on CPUs only.",
                parameter="enable_lora",
            )
        self._rank = config.rank
        self._max_rank = config.max_lora_rank
        self._num_slots = config.num_adapter_slots
        self._num_kept = config.num_kept_adapters
        self._model = model
        self._layers: dict[str, LoraSlots] = {}
        for path, linear in adaptable_linears(model):
            widths = tuple(linear.parts.values())
            shape = LoraShape(linear.stored_inputs, widths, config.num_adapter_slots, config.max_lora_rank)
            linear.adapters = self._layers[path] = make_slots(shape, dtype, model.device)
        # least recently used first
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._slots: OrderedDict[str, int] = OrderedDict()

    def load(self, spec: AdapterSpec) -> None:
        """Load an adapter unless it is loaded. Raises RequestError if its files cannot be used with this model, or are
        not those of the digest."""
        if spec.digest in self._loaded:
            self._loaded.move_to_end(spec.digest)
            return
        folder = Path(spec.path)
        try:
            found = adapter_digest(folder)
            if found != spec.digest:
                raise ModelError(
                    f"{folder}: expected the files of digest {spec.digest}, found {found}: they have changed. Load the "
                    "adapter again."
                )
            adapter = read_adapter(folder, self._model, self._max_rank)
        except ModelError as error:
            text = f"adapter {spec.name!r}: {error}"
            raise RequestError(text, parameter="lora_request", value=spec.path) from error
        while len(self._loaded) >= self._num_kept:
            self._loaded.popitem(last=False)
        self._loaded[spec.digest] = adapter

    def forget(self, digest: str) -> bool:
        """Free the memory of an adapter; whether it was loaded. A request that still uses it loads it again."""
        return self._loaded.pop(digest, None) is not None

    @property
    def digests(self) -> list[str]:
        """Of the loaded adapters, least recently used first."""
        return list(self._loaded)

    def prepare(self, states: Sequence[RequestState], errors: dict[str, ErrorInfo]) -> None:
        """Put the adapters of a step's requests into slots; enter requests whose adapter cannot be loaded into
        `errors`. Raises MessageMalformed for more adapters than slots."""
        wanted: dict[str, list[RequestState]] = {}
        for state in states:
            if state.adapter is not None:
                wanted.setdefault(state.adapter.digest, []).append(state)
        if len(wanted) > self._num_slots:
            expected, found = f"at most max_loras={self._num_slots} adapters", len(wanted)
            raise MessageMalformed(f"ExecuteStep: scheduled: expected {expected}, found {found}.", field="scheduled")
        for digest in wanted:
            if digest in self._slots:
                self._slots.move_to_end(digest)
        for digest, users in wanted.items():
            spec = users[0].adapter
            assert spec is not None
            try:
                slot = self._slots[digest] if digest in self._slots else self._fill(spec)
            except RequestError as error:
                for state in users:
                    state.error = errors[state.request_id] = describe(error, self._rank)
                continue
            for state in users:
                state.adapter_slot = slot

    def _fill(self, spec: AdapterSpec) -> int:
        """Put an adapter into a slot: a free one, or that of the least recently used, which this step does not use."""
        self.load(spec)
        adapter = self._loaded[spec.digest]
        slot = len(self._slots) if len(self._slots) < self._num_slots else self._slots.popitem(last=False)[1]
        for path, layer in self._layers.items():
            layer.put(slot, adapter.get(path, (None,) * len(layer.shape.widths)))
        self._slots[spec.digest] = slot
        return slot


def adapter_methods(store: Callable[[], AdapterStore | None]) -> dict[str, Callable[..., object]]:
    """The public methods of a worker with this store, by name. They raise RequestError where it serves none."""

    def required() -> AdapterStore:
        found = store()
        if found is None:
            text = "lora_request: expected an engine with enable_lora=True, found one without."
            raise RequestError(text, parameter="lora_request")
        return found

    def load_adapter(name: str, path: str, digest: str) -> None:
        required().load(AdapterSpec(name=name, path=path, digest=digest))

    def forget_adapter(digest: str) -> bool:
        return required().forget(digest)

    def adapter_digests() -> list[str]:
        return required().digests

    return {method.__name__: method for method in (load_adapter, forget_adapter, adapter_digests)}
