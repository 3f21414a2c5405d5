"""`sempre.entrypoints.llm`, the path that users of vLLM import LLM from."""
