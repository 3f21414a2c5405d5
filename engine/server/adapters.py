"""The adapters that clients name as `model`: those of the configuration, and those loaded while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count

import msgspec

from sempre.engine.adapters import LoRARequest
from sempre.engine.async_llm import AsyncLLM
from sempre.engine.server.errors import APIError, BadRequest
from sempre.ipc.errors import ConfigError

_FORM = "name=path, or JSON with name, path and base_model_name"


class LoraModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter of the configuration."""

    name: str
    path: str
    base_model_name: str | None = None


def lora_modules(texts: Sequence[str]) -> list[LoraModule]:
    """Read the setting `lora_modules`. Raises ConfigError naming the entry."""
    modules: list[LoraModule] = []
    for text in texts:
        try:
            if text.lstrip().startswith("{"):
                module = msgspec.json.decode(text, type=LoraModule)
            else:
                name, _, path = text.partition("=")
                module = LoraModule(name, path)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"lora_modules: expected {_FORM}, found {text!r}: {error}.", parameter="lora_modules"
            ) from None
        if not module.name or not module.path:
            raise ConfigError(f"lora_modules: expected {_FORM}, found {text!r}.", parameter="lora_modules", value=text)
        if any(module.name == other.name for other in modules):
            raise ConfigError(f"lora_modules: {module.name!r} is there twice.", parameter="lora_modules", value=text)
        modules.append(module)
    return modules


class ServedAdapters:
    """By the name that clients use."""

    def __init__(self, engine: AsyncLLM, model_names: Sequence[str], modules: Sequence[LoraModule]) -> None:
        """Raises ConfigError for adapters without `enable_lora`, or with a name of the model."""
        self._engine = engine
        self._model_names = model_names
        self._modules = modules
        self._ids = count(1)
        self._named: dict[str, LoRARequest] = {}
        self._changes = asyncio.Lock()
        if modules and not engine.config.enable_lora:
            raise ConfigError("lora_modules has no effect without enable_lora.", parameter="lora_modules")
        for module in modules:
            if module.name in model_names:
                text = f"lora_modules: {module.name!r} is a name of the model itself."
                raise ConfigError(text, parameter="lora_modules", value=module.name)

    @property
    def names(self) -> list[str]:
        """In the order of loading."""
        return list(self._named)

    def of(self, model: str | None) -> LoRARequest | None:
        """The adapter that a request names as its model, if it names one."""
        return self._named.get(model or "")

    async def start(self) -> None:
        """Load those of the configuration. Raises RequestError for one that cannot be used."""
        for module in self._modules:
            if module.name not in self._named:
                await self._add(LoRARequest(module.name, next(self._ids), module.path, module.base_model_name))

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Load one more; with `replace`, it may take the place of one of that name. Raises APIError, RequestError."""
        async with self._changes:
            known = self._named.get(name)
            if name in self._model_names:
                raise BadRequest(f"{name!r} is a name of the model itself.", param="lora_name")
            if known is not None and not replace:
                raise BadRequest(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True.",
                    param="lora_name",
                )
            await self._add(LoRARequest(name, next(self._ids), path))
            if known is not None:
                await self._engine.remove_lora(known.lora_int_id)

    async def unload(self, name: str, lora_id: int | None) -> None:
        """Requests that run with it go on. Raises APIError (404) for an unknown name."""
        async with self._changes:
            known = self._named.get(name)
            if known is None or lora_id not in (None, known.lora_int_id):
                raise APIError(404, f"The lora adapter '{name}' cannot be found.", param="lora_name")
            del self._named[name]
            await self._engine.remove_lora(known.lora_int_id)

    async def _add(self, request: LoRARequest) -> None:
        await self._engine.add_lora(request)
        self._named[request.lora_name] = request
