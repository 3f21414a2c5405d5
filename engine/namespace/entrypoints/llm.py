"""LLM, under the path that users of vLLM import it from."""

from sempre.engine.llm import LLM

__all__ = ["LLM"]
