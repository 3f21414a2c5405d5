"""`LLM` and `AsyncLLM`: the calls about low-rank adapters."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from sempre.engine.adapters import Adapter, LoRARequest, Requested
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.pooling_calls import AsyncPoolingLLM, PoolingLLM
from sempre.ipc.messages import AdapterSpec


def _arguments(spec: AdapterSpec) -> list[object]:
    return [spec.name, spec.path, spec.digest]


class LoraLLM(PoolingLLM):
    """Base class of `LLM`."""

    @abstractmethod
    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> list[object]:
        """Call a method of every worker."""

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter into every worker; whether it was new. `generate` does so by itself.

        Raises RequestError for files that cannot be used with this model, naming file, field, expected and found.
        """
        registry = self._frontend.adapters
        was_known = lora_request.lora_int_id in registry.ids
        self._load(lora_request)
        return not was_known

    def remove_lora(self, lora_id: int) -> bool:
        """Free the memory of the adapter with this number; whether there was one. Running requests go on with it."""
        registry = self._frontend.adapters
        was_known = lora_id in registry.ids
        spec = registry.remove(lora_id)
        if spec is not None:
            self.collective_rpc("forget_adapter", args=[spec.digest])
        return was_known

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that were loaded and not removed."""
        return self._frontend.adapters.ids

    def _load(self, requested: Requested) -> list[Adapter | None]:
        """Return the adapters that a call asks for, which every worker has accepted. Raises RequestError."""
        registry = self._frontend.adapters
        adapters = registry.find(requested)
        for adapter in registry.unknown(adapters):
            self.collective_rpc("load_adapter", args=_arguments(adapter.spec))
        registry.accept(adapters)
        return adapters


class AsyncLoraLLM(AsyncPoolingLLM):
    """Base class of `AsyncLLM`."""

    @abstractmethod
    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> list[object]:
        """Call a method of every worker."""

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter into every worker, like `LLM.add_lora`; `generate` does so by itself, `stream` does not."""
        registry = self._frontend.adapters
        was_known = lora_request.lora_int_id in registry.ids
        await self._load(lora_request)
        return not was_known

    async def remove_lora(self, lora_id: int) -> bool:
        """Free the memory of the adapter with this number, like `LLM.remove_lora`."""
        registry = self._frontend.adapters
        was_known = lora_id in registry.ids
        spec = registry.remove(lora_id)
        if spec is not None:
            await self.collective_rpc("forget_adapter", args=[spec.digest])
        return was_known

    async def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that were loaded and not removed."""
        return self._frontend.adapters.ids

    def fingerprint_of(self, request: PreparedRequest) -> str:
        """Return the fingerprint of a request's outputs, which depends on its adapter."""
        return self._frontend.fingerprint_with(request.adapter)

    def _loaded(self, requested: Requested) -> list[Adapter | None]:
        """Return the adapters that a call asks for. Raises RequestError for one that is not loaded yet."""
        return self._frontend.adapters.loaded(requested)

    async def _load(self, requested: Requested) -> list[Adapter | None]:
        """Return the adapters that a call asks for, which every worker has accepted. Raises RequestError."""
        registry = self._frontend.adapters
        # large files are hashed
        adapters = await asyncio.to_thread(registry.find, requested)
        for adapter in registry.unknown(adapters):
            await self.collective_rpc("load_adapter", args=_arguments(adapter.spec))
        registry.accept(adapters)
        return adapters
