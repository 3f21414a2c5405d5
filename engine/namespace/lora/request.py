"""LoRARequest, under the path that users of vLLM import it from."""

from sempre.engine.adapters import LoRARequest

__all__ = ["LoRARequest"]
