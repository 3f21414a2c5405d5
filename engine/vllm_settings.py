"""Settings of vLLM that this engine does not need, each with the values that match its behaviour.

Any other value is refused by name, so no setting is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sempre.ipc.errors import ConfigError, RequestError

# keywords of `LLM`, and flags of every command that starts an engine
VLLM_KEYWORDS: dict[str, tuple[object, ...]] = {
    "additional_config": (None, {}),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    # steps are always sent ahead; results do not depend on it
    "async_scheduling": (None, True, False),
    "attention_backend": (None,),
    "attention_config": (None,),
    "calculate_kv_scales": (False,),
    "code_revision": (None,),
    "collect_detailed_traces": (None,),
    "compilation_config": (None, 0),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "cudagraph_capture_sizes": (None,),
    "cudagraph_metrics": (False,),
    "data_parallel_backend": ("mp",),
    "dcp_kv_cache_interleave_size": (1,),
    "decode_context_parallel_size": (1,),
    # attention is computed in one order, shared prefix or not
    "disable_cascade_attn": (True, False),
    "disable_chunked_mm_input": (False,),
    "disable_custom_all_reduce": (True, False),
    "disable_hybrid_kv_cache_manager": (None, False),
    # statistics are always kept: get_metrics, /metrics
    "disable_log_stats": (True, False),
    "disable_sliding_window": (False,),
    "distributed_executor_backend": (None, "mp"),
    "enable_chunked_prefill": (None, True),
    "enable_dbo": (False,),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_log_requests": (False,),
    "enable_flashinfer_autotune": (None, True, False),
    "enable_logging_iteration_details": (False,),
    "enable_lora": (False,),
    "enable_mm_embeds": (False,),
    "enable_prompt_embeds": (False,),
    "enable_return_routed_experts": (False,),
    "enable_sleep_mode": (False,),
    "fail_on_environ_validation": (False,),
    "fully_sharded_loras": (False,),
    "hf_config_path": (None,),
    "hf_token": (None,),
    "ignore_patterns": (None, []),
    "interleave_mm_strings": (False,),
    "io_processor_plugin": (None,),
    "kernel_config": (None,),
    "kv_cache_dtype": ("auto",),
    "kv_events_config": (None,),
    "kv_offloading_size": (None,),
    "kv_sharing_fast_prefill": (False,),
    "kv_transfer_config": (None,),
    # text only
    "language_model_only": (True, False),
    "limit_mm_per_prompt": (None, {}, {"image": 0}, {"image": 0, "video": 0}, {"image": 0, "video": 0, "audio": 0}),
    "logits_processor_pattern": (None,),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "long_prefill_token_threshold": (0,),
    "lora_dtype": ("auto",),
    "mamba_block_size": (None,),
    "mamba_cache_dtype": ("auto",),
    "mamba_ssm_cache_dtype": ("auto",),
    "max_cpu_loras": (None,),
    "max_cudagraph_capture_size": (None,),
    "max_long_partial_prefills": (1,),
    "max_lora_rank": (16,),
    "max_loras": (1,),
    "max_num_partial_prefills": (1,),
    "max_parallel_loading_workers": (None,),
    "mm_encoder_only": (False,),
    "mm_encoder_tp_mode": ("weights",),
    "mm_processor_cache_gb": (0, 4),
    "mm_processor_cache_type": ("lru",),
    "mm_processor_kwargs": (None, {}),
    "model_impl": ("auto", "vllm"),
    "model_loader_extra_config": (None, {}),
    "num_gpu_blocks_override": (None,),
    "num_redundant_experts": (0,),
    "offload_backend": ("auto",),
    "optimization_level": (None, 2),
    "otlp_traces_endpoint": (None,),
    "performance_mode": ("balanced",),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "prefill_context_parallel_size": (1,),
    "prefix_caching_hash_algo": ("sha256",),
    "profiler_config": (None,),
    "pt_load_map_location": ("cpu",),
    "ray_workers_use_nsight": (False,),
    "renderer_num_workers": (1,),
    "runner": ("auto", "generate"),
    "safetensors_load_strategy": ("lazy",),
    "scheduler_reserve_full_isl": (True, False),
    "show_hidden_metrics_for_version": (None,),
    "skip_mm_profiling": (True, False),
    # nothing is swapped; preempted requests are recomputed
    "swap_space": (0, 4),
    "task": (None, "auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "use_tqdm_on_load": (True, False),
    "video_pruning_rate": (None,),
    "weight_transfer_config": (None,),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
}

# flags of `sempre serve` alone
VLLM_SERVER_SETTINGS: dict[str, tuple[object, ...]] = {
    "allow_credentials": (False,),
    "allowed_headers": (["*"],),
    "allowed_methods": (["*"],),
    "api_server_count": (None, 1),
    "disable_access_log_for_endpoints": (None,),
    "disable_fastapi_docs": (False,),
    "disable_log_requests": (True,),
    # one process handles all requests
    "disable_frontend_multiprocessing": (True, False),
    "enable_log_deltas": (True, False),
    "enable_log_outputs": (False,),
    "enable_offline_docs": (False,),
    # usage.prompt_tokens_details is always reported
    "enable_prompt_tokens_details": (True, False),
    # every response has an X-Request-Id
    "enable_request_id_headers": (True, False),
    # /load always counts
    "enable_server_load_tracking": (True, False),
    "enable_ssl_refresh": (False,),
    # /tokenizer_info is always served
    "enable_tokenizer_info_endpoint": (True, False),
    "exclude_tools_when_tool_choice_none": (False,),
    "fingerprint_mode": ("full",),
    "fingerprint_value": (None,),
    "grpc": (False,),
    "h11_max_header_count": (None,),
    "h11_max_incomplete_event_size": (None,),
    "headless": (False,),
    "log_config_file": (None,),
    "log_error_stack": (False,),
    "lora_modules": (None,),
    "reasoning_parser_plugin": ("",),
    "ssl_cert_reqs": (0,),
    "ssl_ciphers": (None,),
    "tokens_only": (False,),
    "tool_parser_plugin": ("",),
    "tool_server": (None,),
}
_TABLE = VLLM_KEYWORDS | VLLM_SERVER_SETTINGS

_INSTEAD = {
    "enable_log_requests": "It is a flag of `sempre serve`.",
    "exclude_tools_when_tool_choice_none": "Leave tools out of such requests.",
    "fingerprint_value": "The fingerprint is what outputs depend on, and cannot be given.",
    "hf_token": "Set the environment variable HF_TOKEN.",
    "log_config_file": "Use log_format.",
    "logits_processors": "Use logit_bias, allowed_token_ids or bad_words of SamplingParams.",
    "otlp_traces_endpoint": "Set up an OpenTelemetry SDK in the process; see the extra `otel`.",
    "ssl_cert_reqs": "Give ssl_ca_certs, and clients must show a certificate.",
}
_SECRETS = ("hf_token",)


def check_vllm_setting(name: str, value: object) -> None:
    """Raise ConfigError unless a setting of the table matches the engine's behaviour."""
    if any(_is_same(value, same) for same in _TABLE[name]):
        return
    shown = name if name in _SECRETS else f"{name}={value!r}"
    raise ConfigError(
        f"{shown} is not supported by this engine. {_INSTEAD.get(name, 'Leave it out.')}",
        parameter=name,
        value=None if name in _SECRETS else value,
    )


def _is_same(value: object, same: object) -> bool:
    """Equal and of one kind: 0 equals 0.0 but not False."""
    return value == same and isinstance(value, bool) == isinstance(same, bool)


def check_vllm_settings(settings: Mapping[str, object]) -> None:
    """Check the server's settings among `settings`. Raises ConfigError."""
    for name in VLLM_SERVER_SETTINGS:
        if name in settings:
            check_vllm_setting(name, settings[name])


def refuse_values(**arguments: object) -> None:
    """Raise RequestError naming the first argument that is neither None nor empty."""
    for name, value in arguments.items():
        asked = value
        if isinstance(value, Sequence) and not isinstance(value, str):
            asked = any(item is not None for item in value)
        if asked is None or asked is False or (isinstance(asked, Mapping) and not asked):
            continue
        raise RequestError(f"{name} is not supported by this engine. Leave it out.", parameter=name, value=value)
