"""Names that vLLM's engines have and this one lacks, and what to use instead."""

from __future__ import annotations

from collections.abc import Iterable

from sempre.engine.near_names import near_name

_TEXT_ALONE = "This engine only generates text."
_NO_ADAPTERS = "This engine does not support adapters; merge them into the checkpoint."
_PROFILE = (
    "Make the engine with multiprocessing=False and run it inside torch.profiler.profile(), or attach a sampling "
    "profiler to the worker processes."
)
_SLEEP = "Call shutdown() to free memory, and create a new engine: the same requests give the same bits."
_HEALTH = "Use `await engine.health()`, which returns the state and the problems by rank."
_INSTEAD = {
    "add_lora": _NO_ADAPTERS,
    "add_request": "Use generate(…), or stream(…) for several prompts.",
    "apply_model": (
        "Functions are never sent to another process; call a method of the workers by its name: collective_rpc(…)."
    ),
    "beam_search": (
        "Ask for samples, SamplingParams(n=…, logprobs=0), and keep the one with the highest cumulative_logprob."
    ),
    "check_and_raise_dead_error": _HEALTH,
    "classify": _TEXT_ALONE,
    "dead_error": _HEALTH,
    "do_log_stats": "Use get_metrics().",
    "embed": _TEXT_ALONE,
    "encode": f"{_TEXT_ALONE} For token ids use get_tokenizer().encode(…).",
    "errored": _HEALTH,
    "get_decoding_config": "Use `config`.",
    "get_model_config": "Use `config`, and `ready` for the limits in use.",
    "get_vllm_config": "Use `config`, and `ready` for the limits in use.",
    "is_running": _HEALTH,
    "is_sleeping": _SLEEP,
    "is_stopped": _HEALTH,
    "list_loras": _NO_ADAPTERS,
    "pin_lora": _NO_ADAPTERS,
    "remove_lora": _NO_ADAPTERS,
    "reset_encoder_cache": _TEXT_ALONE,
    "reset_mm_cache": _TEXT_ALONE,
    "reward": _TEXT_ALONE,
    "set_tokenizer": "Pass tokenizer=… when you create the engine.",
    "sleep": _SLEEP,
    "start_profile": _PROFILE,
    "stop_profile": _PROFILE,
    "wake_up": _SLEEP,
}


def absent(kind: str, name: str, known: Iterable[str]) -> AttributeError:
    """Return the error for an attribute that an engine of this `kind` lacks; `known` are its attributes."""
    if name in _INSTEAD:
        return AttributeError(f"{kind} has no {name!r}. {_INSTEAD[name]}")
    near = None if name.startswith("_") else near_name(name, [other for other in known if not other.startswith("_")])
    return AttributeError(f"{kind} has no attribute {name!r}.{f' Did you mean {near!r}?' if near else ''}")
