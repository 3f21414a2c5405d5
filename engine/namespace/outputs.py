"""Outputs, under the path that users of vLLM import them from."""

from sempre.engine.outputs import CompletionOutput, RequestOutput

__all__ = ["CompletionOutput", "RequestOutput"]
