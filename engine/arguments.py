"""From the keywords of `LLM`, `AsyncLLM` and the command line to validated settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_type_hints

import msgspec
from msgspec import Struct

from sempre.engine.near_names import near_name
from sempre.engine.nodes import check_nodes
from sempre.engine.setting_values import checked
from sempre.engine.speculation.settings import speculative_config
from sempre.engine.vllm_settings import VLLM_KEYWORDS, check_vllm_setting
from sempre.ipc.config import (
    BLOCK_SIZES,
    Convert,
    Count,
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    KVEventsConfig,
    LoadFormat,
    LogprobsMode,
    Numerics,
    NumericsProfile,
    PoolerConfig,
    Quantization,
    Runner,
    SchedulingPolicy,
    SpeculativeConfig,
    SpeculativeMethod,
    check_device_settings,
    check_kv_events,
    doc,
)
from sempre.ipc.errors import ConfigError

MULTIPROCESSING_VARIABLE = "SEMPRE_MULTIPROCESSING"


class FrontendConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the user's process only; the coordinator and the workers never see them."""

    tokenizer: Annotated[str | None, doc("folder or hub id of another tokenizer; None is the model's")] = None
    tokenizer_revision: Annotated[str | None, doc("branch, tag or commit of the tokenizer's hub id")] = None
    skip_tokenizer_init: Annotated[bool, doc("no tokenizer: prompts and outputs are token ids")] = False
    revision: Annotated[str | None, doc("branch, tag or commit of a hub id")] = None
    download_dir: Annotated[str | None, doc("folder for downloads from the hub; None is the hub's default")] = None
    trust_remote_code: Annotated[bool, doc("allowed for a model without code of its own; none is ever run")] = False
    hf_overrides: Annotated[dict[str, Any] | None, doc("fields of config.json to replace")] = None
    override_generation_config: Annotated[
        dict[str, Any] | None, doc("default sampling parameters, replacing those of generation_config.json")
    ] = None
    generation_config: Annotated[
        Literal["auto", "vllm"], doc("default sampling parameters: the model's (auto), or SamplingParams' (vllm)")
    ] = "auto"
    chat_template: Annotated[str | None, doc("Jinja chat template, or a file with one; None is the model's")] = None
    chat_template_content_format: Annotated[
        Literal["auto", "string", "openai"],
        doc("message contents for the template: whichever form it reads (auto), one string, or a list of parts"),
    ] = "auto"
    default_chat_template_kwargs: Annotated[
        dict[str, Any] | None, doc("default variables of the chat template; a conversation may override them")
    ] = None
    structured_outputs_config: Annotated[
        dict[str, Any] | None, doc("backend and defaults of structured outputs: disable_any_whitespace, …")
    ] = None
    stream_interval: Annotated[Count, doc("tokens between two outputs of a stream; the first output comes at once")] = 1
    record: Annotated[
        str | bool | None, doc("folder to which a receipt of every output is appended; in Python also True, no folder")
    ] = None
    record_key: Annotated[str | None, doc("PEM file of the ed25519 private key that signs receipts")] = None
    record_private: Annotated[bool, doc("receipts have a digest of the prompt in place of its tokens")] = False
    served_model_name: Annotated[str | None, doc("the model's name in metrics; a server has its own setting")] = None


class EngineKeywords(TypedDict, total=False):
    """Keywords of `LLM` and `AsyncLLM`: the fields of EngineConfig and FrontendConfig, with their defaults."""

    seed: int
    dtype: Dtype | Literal["half", "float"]
    quantization: Quantization | None
    # sizes may also be strings: "4GiB", "2k"
    max_model_len: int | str | None
    max_num_seqs: int | str | None
    max_num_batched_tokens: int | str | None
    block_size: int | None
    enable_prefix_caching: bool
    kv_events_config: KVEventsConfig | Mapping[str, Any] | None
    kv_cache_dtype: KvCacheDtype | Literal["fp8_e4m3"]
    kv_cache_memory_bytes: int | str | None
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    node_key_file: str | None
    num_threads: int
    multiprocessing: bool
    scheduling_policy: SchedulingPolicy
    device: Device
    gpu_memory_utilization: float
    enforce_eager: bool
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None
    runner: Runner
    convert: Convert
    pooler_config: PoolerConfig | Mapping[str, Any] | None
    enable_lora: bool
    max_loras: int
    max_lora_rank: int
    max_cpu_loras: int | None
    numerics: Numerics
    numerics_profile: NumericsProfile | None
    load_format: LoadFormat
    max_logprobs: int
    logprobs_mode: LogprobsMode
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    step_timeout_s: float
    startup_timeout_s: float
    max_restarts: int
    restart_window_s: float
    max_request_crashes: int
    max_message_bytes: int | str
    tokenizer: str | None
    tokenizer_revision: str | None
    skip_tokenizer_init: bool
    revision: str | None
    download_dir: str | None
    trust_remote_code: bool
    hf_overrides: dict[str, Any] | None
    override_generation_config: dict[str, Any] | None
    generation_config: Literal["auto", "vllm"]
    chat_template: str | None
    chat_template_content_format: Literal["auto", "string", "openai"]
    default_chat_template_kwargs: dict[str, Any] | None
    structured_outputs_config: dict[str, Any] | None
    stream_interval: int
    record: str | bool | None
    record_key: str | None
    record_private: bool
    served_model_name: str | list[str] | None
    spec_method: SpeculativeMethod | None
    spec_model: str | None
    spec_tokens: int | None


class Arguments(NamedTuple):
    """Validated settings and the resolved model."""

    engine: EngineConfig
    frontend: FrontendConfig


# other names for a value of a setting
SAME_VALUES: dict[str, dict[object, object]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "max_model_len": {"auto": None, -1: None},
}
SHORT_SPECULATION: dict[str, Any] = {
    "spec_method": Annotated[SpeculativeMethod | None, doc("speculative_config's method")],
    "spec_model": Annotated[str | None, doc("speculative_config's model")],
    "spec_tokens": Annotated[int | None, doc("speculative_config's num_speculative_tokens")],
}
_DERIVED_FIELDS = ("model", "model_path", "weights_path")
_PYTHON_ALONE = "served_model_name"
"""A keyword without a flag: the server has a setting of that name."""


def field_types(config: type[Struct]) -> dict[str, Any]:
    """Return the annotated type of each field a user may set."""
    hints = get_type_hints(config, include_extras=True)
    left_out = (*_DERIVED_FIELDS, _PYTHON_ALONE) if config is FrontendConfig else _DERIVED_FIELDS
    return {name: hint for name, hint in hints.items() if name not in left_out}


def parse_arguments(
    model: str | os.PathLike[str], keywords: Mapping[str, object], *, progress: bool = True
) -> Arguments:
    """Validate all keywords, then find the model (this may download it, with a progress bar if `progress`).

    If `multiprocessing` is not given, the environment variable SEMPRE_MULTIPROCESSING (0 or 1) decides. None means
    not given, except for the seed.

    Raises TypeError for an unknown keyword, ConfigError for a refused value, ModelError for an unusable model.
    """
    engine_types, frontend_types = field_types(EngineConfig), field_types(FrontendConfig)
    engine: dict[str, Any] = {}
    frontend: dict[str, Any] = {}
    short: dict[str, Any] = {}
    for name, value in keywords.items():
        if value is None and name in _NEVER_NONE:
            continue
        if name == _PYTHON_ALONE:
            frontend[name] = _first_name(value)
        elif name in SHORT_SPECULATION:
            short[name] = _setting(name, value, SHORT_SPECULATION[name])
        elif name == "speculative_config":
            pass
        elif name in engine_types:
            engine[name] = _setting(name, value, engine_types[name])
        elif name in frontend_types:
            frontend[name] = _setting(name, value, frontend_types[name])
        else:
            _refuse_unknown(name, value)
    if "multiprocessing" not in engine and MULTIPROCESSING_VARIABLE in os.environ:
        engine["multiprocessing"] = _multiprocessing_from_environment()
    speculative = speculative_config(keywords.get("speculative_config"), short)
    config = EngineConfig(model=os.fspath(model), model_path="", speculative_config=speculative, **engine)
    _check_together(config)
    return _resolved(model, config, FrontendConfig(**frontend), progress)


def _resolved(model: str | os.PathLike[str], config: EngineConfig, front: FrontendConfig, progress: bool) -> Arguments:
    from sempre.engine.models import refuse_remote_code, resolve_model, resolve_tokenizer, with_overrides

    fetch: dict[str, Any] = {"download_dir": front.download_dir, "progress": progress}
    found = resolve_model(model, revision=front.revision, **fetch)
    path, speculative = found.path, config.speculative_config
    if front.trust_remote_code:
        refuse_remote_code(path)
    if front.hf_overrides:
        path = with_overrides(path, front.hf_overrides)
    if speculative is not None and speculative.model is not None:
        draft = resolve_model(speculative.model, **fetch)
        speculative = msgspec.structs.replace(speculative, model=draft.name, model_path=str(draft.path))
    if front.tokenizer is not None or front.tokenizer_revision is not None:
        folder = resolve_tokenizer(front.tokenizer or found.name, revision=front.tokenizer_revision, **fetch)
        front = msgspec.structs.replace(front, tokenizer=str(folder))
    resolved = {"model": found.name, "model_path": str(path), "speculative_config": speculative}
    return Arguments(msgspec.structs.replace(config, **resolved), front)


_NEVER_NONE = frozenset(
    field.name
    for config in (EngineConfig, FrontendConfig)
    for field in msgspec.structs.fields(config)
    if field.default is not None and field.name not in ("seed", *_DERIVED_FIELDS)
)
"""Settings for which None means not given, because their default is another value."""


def engine_config(model: str, *, revision: str | None = None, **keywords: Any) -> EngineConfig:
    """Return the validated configuration of an engine; `keywords` are the fields of EngineConfig.

    Raises as `parse_arguments` does.
    """
    for name, value in keywords.items():
        if name not in field_types(EngineConfig) and name not in SHORT_SPECULATION:
            _refuse_unknown(name, value)
    return parse_arguments(model, {**keywords, "revision": revision}).engine


def check_keywords(kind: str, values: Sequence[object], keywords: Mapping[str, object]) -> None:
    """Raise TypeError for an unknown keyword or a missing model in a call of `kind`."""
    known = _known_keywords()
    for name in keywords:
        if name not in known and name not in VLLM_KEYWORDS:
            raise TypeError(f"{kind} has no keyword {name!r}.{_hint(name, known)}")
    if not values and "model" not in keywords:
        raise TypeError(f"{kind} needs a model; the model `tiny` is always available: {kind}('tiny')")


def engine_keywords_of(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the `values` that are set, as keywords of `LLM`."""
    return {name: value for name, value in values.items() if value is not None or name == "seed"}


def _known_keywords() -> list[str]:
    own = [*field_types(EngineConfig), *field_types(FrontendConfig), *SHORT_SPECULATION]
    return ["model", _PYTHON_ALONE, *own]


def _refuse_unknown(name: str, value: object) -> None:
    """Accept a keyword of vLLM that asks for the engine's normal behaviour; raise for every other one."""
    if name in VLLM_KEYWORDS:
        check_vllm_setting(name, value)
        return
    raise TypeError(f"unknown keyword {name!r}.{_hint(name, _known_keywords())}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = near_name(name, known)
    return f" Did you mean {near!r}?" if near else ""


def _first_name(value: object) -> str | None:
    """Return the model's name in metrics: the first of several, as a server reports it."""
    names = [value] if value is None or isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str | None) and name != "" for name in names)
    ):
        raise ConfigError(
            f"served_model_name must be a name or a list of names, got {value!r}.",
            parameter="served_model_name",
            value=value,
        )
    first: str | None = names[0]
    return first


def _setting(name: str, value: object, hint: Any) -> object:
    same = SAME_VALUES.get(name, {})
    if type(value) in (int, str) and value in same:
        return same[value]
    if name == "seed":
        from sempre.engine.seeding import validate_seed

        return validate_seed(value)
    return checked(name, value, hint)


def _multiprocessing_from_environment() -> bool:
    value = os.environ[MULTIPROCESSING_VARIABLE]
    if value not in ("0", "1"):
        raise ConfigError(
            f"{MULTIPROCESSING_VARIABLE} must be 0 or 1, got {value!r}.",
            parameter=MULTIPROCESSING_VARIABLE,
            value=value,
        )
    return value == "1"


def _check_adapters(config: EngineConfig) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    for name in ("max_loras", "max_lora_rank", "max_cpu_loras"):
        value = getattr(config, name)
        if not config.enable_lora and value != defaults[name]:
            raise ConfigError(f"{name}={value} has no effect without enable_lora=True.", parameter=name, value=value)
    if config.max_cpu_loras is not None and config.max_cpu_loras < config.max_loras:
        raise ConfigError(
            f"max_cpu_loras={config.max_cpu_loras} must be at least max_loras={config.max_loras}.",
            parameter="max_cpu_loras",
            value=config.max_cpu_loras,
        )


def _check_together(config: EngineConfig) -> None:
    if config.heartbeat_timeout_s <= config.heartbeat_interval_s:
        raise ConfigError(
            f"heartbeat_timeout_s={config.heartbeat_timeout_s} must be greater than "
            f"heartbeat_interval_s={config.heartbeat_interval_s}.",
            parameter="heartbeat_timeout_s",
            value=config.heartbeat_timeout_s,
        )
    if config.numerics == "control" and config.profile != "single":
        raise ConfigError(
            "numerics='control' needs numerics_profile='single' and tensor_parallel_size=1: its sums have no set"
            " order.",
            parameter="numerics",
            value=config.numerics,
        )
    if config.tensor_parallel_size not in (1, 2, 4, 8):
        raise ConfigError(
            f"tensor_parallel_size must be 1, 2, 4 or 8, got {config.tensor_parallel_size}.",
            parameter="tensor_parallel_size",
            value=config.tensor_parallel_size,
        )
    if config.profile == "single" and config.tensor_parallel_size > 1:
        raise ConfigError(
            f"numerics_profile='single' needs tensor_parallel_size=1, found {config.tensor_parallel_size}: only the"
            " sums of tree8 can be shared.",
            parameter="numerics_profile",
            value=config.profile,
        )
    _check_adapters(config)
    check_kv_events(config)
    check_nodes(config)
    for name in ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"):
        value = getattr(config, name)
        if value > 1 and not config.multiprocessing:
            raise ConfigError(
                f"{name}={value} needs multiprocessing=True: one process holds one worker.",
                parameter=name,
                value=value,
            )
    if config.device in BLOCK_SIZES:
        check_device_settings(config, config.device)
