"""Forms of prompts, under the path that users of vLLM import them from."""

from sempre.engine.frontend.prompts import PromptType, TextPrompt, TokensPrompt

__all__ = ["PromptType", "TextPrompt", "TokensPrompt"]
