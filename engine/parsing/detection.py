"""Which format a model calls tools in, as far as its chat template says."""

from __future__ import annotations

# what a template that reads calls of a format contains, and the format; the first that fits
_MARKS = (
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("[TOOL_CALLS]",), "mistral"),
    # of GLM, which is not built
    (("<tool_call>", "<arg_key>"), None),
    (("<tool_call>",), "hermes"),
    (("<|start_header_id|>", '"parameters"'), "llama3_json"),
    (("func_name1(params_name1=",), "pythonic"),
)


def tool_format_of(template: str) -> str | None:
    """Return the name of the parser of the tool calls that a chat template writes; None if it shows no known one."""
    return next((name for marks, name in _MARKS if all(mark in template for mark in marks)), None)
