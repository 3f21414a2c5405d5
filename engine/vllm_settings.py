"""Settings of vLLM that this engine does not need, each with the values that match its behaviour.

Any other value is refused by name, so no setting is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sempre.ipc.errors import ConfigError, RequestError

# keywords of `LLM`, and flags of every command that starts an engine
VLLM_KEYWORDS: dict[str, tuple[object, ...]] = {
    "additional_config": (None, {}),
    "aggregate_engine_logging": (False,),
    "all2all_backend": ("allgather_reducescatter",),
    "allow_deprecated_quantization": (False,),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    # steps are always sent ahead; results do not depend on it
    "async_scheduling": (None, True, False),
    "attention_backend": (None, "auto"),
    "attention_config": (None,),
    "aux_output_config": (None, {}),
    "calculate_kv_scales": (False,),
    "code_revision": (None,),
    "collect_detailed_traces": (None,),
    "compilation_config": (None, 0),
    "config_format": ("auto", "hf"),
    "cp_kv_cache_interleave_size": (None, 1),
    "cpu_distributed_timeout_seconds": (None,),
    "cpu_offload_gb": (0,),
    "cpu_offload_params": (None, []),
    "cudagraph_capture_sizes": (None,),
    "cudagraph_metrics": (False,),
    "custom_histogram_buckets": (None,),
    "data_parallel_address": (None,),
    "data_parallel_backend": ("mp",),
    "data_parallel_external_lb": (False,),
    "data_parallel_hybrid_lb": (False,),
    "data_parallel_multi_port_external_lb": (False,),
    "data_parallel_rank": (None, 0),
    "data_parallel_rpc_port": (None,),
    "data_parallel_size_local": (None,),
    "data_parallel_start_rank": (None, 0),
    "dbo_decode_token_threshold": (32,),
    "dbo_prefill_token_threshold": (512,),
    "dcp_comm_backend": (None,),
    "dcp_kv_cache_interleave_size": (1,),
    "dcp_q_replicate": (None, False),
    "decode_context_parallel_size": (1,),
    "default_mm_loras": (None,),
    "device_ids": (None,),
    "diffusion_config": (None,),
    # attention is computed in one order, shared prefix or not
    "disable_cascade_attn": (True, False),
    "disable_chunked_mm_input": (False,),
    "disable_custom_all_reduce": (True, False),
    "disable_hybrid_kv_cache_manager": (None, False),
    # statistics are always kept: get_metrics, /metrics
    "disable_log_stats": (True, False),
    "disable_nccl_for_dp_synchronization": (None, True, False),
    "disable_sliding_window": (False,),
    "distributed_executor_backend": (None, "mp"),
    "distributed_timeout_seconds": (None,),
    "dp_sync_interval": (16,),
    "ec_manager_config": (None, {}),
    "ec_transfer_config": (None,),
    "elastic_ep_max_dp_size": (None,),
    "enable_batch_sharded_sampling": (None, False),
    "enable_chunked_prefill": (None, True),
    "enable_cumem_allocator": (False,),
    "enable_dbo": (False,),
    "enable_elastic_ep": (False,),
    "enable_ep_weight_filter": (False,),
    "enable_eplb": (False,),
    # whole experts always lie on the workers of a replica
    "enable_expert_parallel": (True, False),
    "enable_fault_tolerance": (False,),
    "enable_flashinfer_autotune": (None, True, False),
    "enable_hc_sp": (False,),
    "enable_layerwise_nvtx_tracing": (False,),
    "enable_log_requests": (False,),
    "enable_logging_iteration_details": (False,),
    "enable_mamba_cache_stochastic_rounding": (False,),
    "enable_mamba_shared_prefix_checkpoint": (False,),
    "enable_mfu_metrics": (False,),
    "enable_mixed_moe_lora_format": (False,),
    "enable_mm_embeds": (False,),
    "enable_mm_processor_stats": (False,),
    "enable_moe_shared_loras": (False,),
    "enable_nccl_comm_suspend": (False,),
    "enable_prompt_embeds": (False,),
    "enable_return_routed_experts": (False,),
    "enable_shm_tensor_arena": (False,),
    # a flag of `sempre serve`; in Python an engine can always sleep
    "enable_sleep_mode": (True, False),
    "enable_tower_connector_lora": (False,),
    "enable_trace_replay": (False,),
    "engram_config": (None,),
    "eplb_config": (None, {}),
    "expert_placement_strategy": ("linear",),
    "fail_on_environ_validation": (False,),
    "fault_tolerance_config": (None, {}),
    "fully_sharded_loras": (False,),
    "gdn_prefill_backend": (None,),
    "hf_config_path": (None,),
    "hf_token": (None,),
    "ignore_patterns": (None, []),
    "interleave_mm_strings": (False,),
    "io_processor_plugin": (None,),
    "ir_op_priority": (None, {}),
    "jit_monitor_mode": ("warn",),
    "jit_monitor_verbose": (False,),
    "kda_decode_backend": (None,),
    "kda_prefill_backend": (None,),
    "kernel_config": (None,),
    "kv_cache_dtype_skip_layers": (None, []),
    "kv_cache_metrics": (False,),
    "kv_cache_metrics_sample": (0.01,),
    "kv_offloading_backend": ("native",),
    "kv_offloading_size": (None,),
    "kv_sharing_fast_prefill": (False,),
    "kv_transfer_config": (None,),
    # text only
    "language_model_only": (True, False),
    "limit_mm_per_prompt": (None, {}, {"image": 0}, {"image": 0, "video": 0}, {"image": 0, "video": 0, "audio": 0}),
    "linear_backend": ("auto",),
    "log_config_file": (None,),
    "log_level": (None, "info"),
    "logging_config": (None,),
    "logits_processor_pattern": (None,),
    "logits_processors": (None, []),
    "long_prefill_token_threshold": (0,),
    "long_prefill_token_threshold_adaptive": (False,),
    "lora_dtype": ("auto",),
    "lora_target_modules": (None,),
    "mamba_backend": ("triton",),
    "mamba_block_size": (None,),
    "mamba_cache_dtype": ("auto",),
    "mamba_cache_mode": (None,),
    "mamba_cache_philox_rounds": (0,),
    "mamba_config": (None, {}),
    "mamba_ssm_cache_dtype": ("auto",),
    "mamba_ssu_algorithm": (None,),
    "max_cudagraph_capture_size": (None,),
    "max_long_partial_prefills": (1,),
    "max_lora_cls_labels": (None,),
    "max_num_active_seqs": (None,),
    "max_num_partial_prefills": (1,),
    "max_num_queued_reqs": (None,),
    "max_num_queued_tokens": (None,),
    "max_num_scheduled_tokens": (None,),
    "max_parallel_loading_workers": (None,),
    "media_io_kwargs": (None, {}),
    "mm_device_do_normalize": (True, False),
    "mm_encoder_attn_backend": (None,),
    "mm_encoder_attn_dtype": (None,),
    "mm_encoder_fp8_scale_path": (None,),
    "mm_encoder_fp8_scale_save_margin": (1.5,),
    "mm_encoder_fp8_scale_save_path": (None,),
    "mm_encoder_only": (False,),
    "mm_encoder_tp_mode": ("weights",),
    "mm_hasher_algorithm": ("blake3",),
    "mm_ipc_gpu_memory_gb": (0,),
    "mm_processor_cache_gb": (0, 4),
    "mm_processor_cache_type": ("lru",),
    "mm_processor_device": ("auto",),
    "mm_processor_kwargs": (None, {}),
    "mm_shm_cache_max_object_size_mb": (128,),
    "mm_tensor_ipc": ("direct_rpc",),
    "model_class_overrides": (None, {}),
    "model_impl": ("auto", "vllm"),
    "model_loader_extra_config": (None, {}),
    "model_weights": ("",),
    "moe_backend": ("auto",),
    "monokernel": (False,),
    "num_gpu_blocks_override": (None,),
    "num_redundant_experts": (0,),
    "numa_bind": (False,),
    "numa_bind_cpus": (None,),
    "numa_bind_nodes": (None,),
    "offload_backend": ("auto",),
    "offload_group_size": (0,),
    "offload_num_in_group": (1,),
    "offload_params": (None, []),
    "offload_prefetch_step": (1,),
    "optimization_level": (None, 2),
    "otlp_traces_endpoint": (None,),
    "per_request_spec_decode_metrics": ("none",),
    "performance_mode": ("balanced",),
    "prefill_context_parallel_size": (1,),
    "prefill_schedule_interval": (1,),
    "prefix_cache_retention_interval": (0, None),
    "prefix_caching_hash_algo": ("sha256",),
    "prefix_match_unit": (None,),
    "profiler_config": (None,),
    "pt_load_map_location": ("cpu",),
    "quantization_config": (None,),
    "ray_workers_use_nsight": (False,),
    "reasoning_config": (None, {}, {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}),
    "reasoning_parser": ("",),
    "reasoning_parser_plugin": ("", None),
    "renderer_num_workers": (1,),
    "replayssm_buffer_len": (16,),
    "return_sampling_mask": (False,),
    "safetensors_load_strategy": ("lazy",),
    "safetensors_prefetch_block_size": (16777216,),
    "safetensors_prefetch_num_threads": (8,),
    "scheduler_cls": (None,),
    "scheduler_reserve_full_isl": (True, False),
    "show_hidden_metrics_for_version": (None,),
    "shutdown_timeout": (0,),
    "skip_mm_profiling": (True, False),
    "sleep_mode_backend": ("cumem",),
    "sleep_mode_offload_cudagraph": (False,),
    "sleep_preserve_parameter_names": (None, []),
    "sparse_indexer_topk_backend": ("auto",),
    "specialize_active_lora": (False,),
    "swa_bounded_replay": (True, False),
    # nothing is swapped; preempted requests are recomputed
    "swap_space": (0, 4),
    "task": (None, "auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "tokens_only": (False,),
    "ubatch_size": (0,),
    "use_fp64_gumbel": (False,),
    "use_replayssm": (False,),
    "use_tqdm_on_load": (True, False),
    "video_pruning_method": ("evs",),
    "video_pruning_rate": (None,),
    "watchdog_config": (None, {}),
    "watermark": (0,),
    "watermark_config": (None,),
    "weight_transfer_config": (None,),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
}

# flags of `sempre serve` alone
VLLM_SERVER_SETTINGS: dict[str, tuple[object, ...]] = {
    "allow_credentials": (False,),
    "allowed_headers": (["*"],),
    "allowed_methods": (["*"],),
    "anthropic_disabled_thinking_effort": ("auto",),
    "cohere_format": ("cmd4",),
    "cohere_is_reasoning_model": (True, False),
    "data_parallel_supervisor_port": (9256,),
    "disable_fastapi_docs": (False,),
    # one process handles all requests
    "disable_frontend_multiprocessing": (True, False),
    "disable_log_requests": (True,),
    "dp_supervisor_probe_failure_threshold": (3,),
    "dp_supervisor_probe_interval_s": (5,),
    "dp_supervisor_probe_timeout_s": (5,),
    "enable_flash_late_interaction": (True, False),
    "enable_log_deltas": (True, False),
    "enable_log_outputs": (False,),
    "enable_offline_docs": (False,),
    # usage.prompt_tokens_details is always reported
    "enable_prompt_tokens_details": (True, False),
    # every response has an X-Request-Id
    "enable_request_id_headers": (True, False),
    "enable_scale_out": (False,),
    # /load always counts
    "enable_server_load_tracking": (True, False),
    "enable_ssl_refresh": (False,),
    # /tokenizer_info is always served
    "enable_tokenizer_info_endpoint": (True, False),
    "exclude_tools_when_tool_choice_none": (False,),
    "fingerprint_mode": ("full",),
    "fingerprint_value": (None,),
    "grpc": (False,),
    "grpc_port": (None,),
    "h11_max_header_count": (None,),
    "h11_max_incomplete_event_size": (None,),
    "log_error_stack": (False,),
    "reasoning_effort_map": (None, {}),
    "sse_keep_alive_interval": (0,),
    "ssl_cert_reqs": (0,),
    "ssl_ciphers": (None,),
    "tool_parser_plugin": ("",),
    "tool_server": (None,),
    "tool_strict_level": (None,),
    "trust_request_mm_kwargs": (False,),
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
    "task": "Use runner and convert.",
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
