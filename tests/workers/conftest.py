"""Random tiny checkpoints of every family, saved by transformers, and a worker driven by real messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from worker_settings import worker_config

from sempre.ipc.messages import (
    AdapterSpec,
    ExecuteStep,
    LoadModel,
    LogprobRows,
    ModelLoaded,
    NewRequest,
    PoolingSpec,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StartServing,
    WorkerReady,
)
from sempre.workers.worker import Worker

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# caps so low that they bend what is computed
GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# of 3 of 5 experts
ODD_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.5}
PROPORTIONAL_ROPE = {"rope_type": "proportional", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.4}
GEMMA4 = {"vocab_size_per_layer_input": 320, "head_dim": 32, "global_head_dim": 64, "sliding_window": 20}
UNIFIED = {"head_dim": 32, "global_head_dim": 64, "sliding_window": 20, "num_global_key_value_heads": 1}
WINDOWED, FULL = "sliding_attention", "full_attention"
# odd: one group of heads, other dimensions of keys and values, another width, each kind of layer first
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32}
ODD_DELTA = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip


def longrope(count: int, **more: Any) -> dict[str, Any]:
    """Factors for heads of `count` waves."""
    short, long = [1 + 0.1 * i for i in range(count)], [1.5 + 0.5 * i for i in range(count)]
    return {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": short, "long_factor": long, **more}


def tiny_configs() -> dict[str, transformers.PretrainedConfig]:
    """The variants that differ in what the decoder must do."""
    llama, mistral = transformers.LlamaConfig, transformers.MistralConfig
    qwen2, qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
    gemma2, qwen3_moe = transformers.Gemma2Config, transformers.Qwen3MoeConfig
    glm, glm4, glm4_moe = transformers.GlmConfig, transformers.Glm4Config, transformers.Glm4MoeConfig
    mixtral, qwen2_moe = transformers.MixtralConfig, transformers.Qwen2MoeConfig
    smollm3, granite, phi3 = transformers.SmolLM3Config, transformers.GraniteConfig, transformers.Phi3Config
    gemma4 = transformers.Gemma4TextConfig
    qwen3_5, qwen3_5_moe = transformers.Qwen3_5TextConfig, transformers.Qwen3_5MoeTextConfig
    qwen3_next = transformers.Qwen3NextConfig
    olmo2, olmo3, gemma3 = transformers.Olmo2Config, transformers.Olmo3Config, transformers.Gemma3TextConfig
    gpt_oss = transformers.GptOssConfig
    return {
        "llama": llama(**COMMON),
        "llama-multi-head-tied": llama(**{**COMMON, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        "llama-biases": llama(**COMMON, attention_bias=True, mlp_bias=True),
        "llama-llama3-rope": llama(**COMMON, rope_parameters=LLAMA3_ROPE),
        "llama-linear-rope": llama(**COMMON, rope_parameters=LINEAR_ROPE),
        "llama-dynamic-rope": llama(
            **{**COMMON, "max_position_embeddings": 64},
            rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
        ),
        "llama-proportional-rope": llama(**COMMON, rope_parameters=PROPORTIONAL_ROPE),
        "llama-yarn-rope": llama(**COMMON, rope_parameters=YARN_ROPE),
        "llama-head-dim": llama(**COMMON, head_dim=48),
        "mistral-window": mistral(**COMMON, sliding_window=24),
        "mistral3-multimodal": transformers.Mistral3Config(
            text_config=mistral(**COMMON, head_dim=32, sliding_window=None),
            vision_config=transformers.PixtralVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28
            ),
            tie_word_embeddings=False,
        ),
        "qwen2": qwen2(**COMMON, tie_word_embeddings=True),
        "qwen2-upper-window": qwen2(**COMMON, use_sliding_window=True, sliding_window=20, max_window_layers=1),
        "qwen3": qwen3(**COMMON, head_dim=32),
        "qwen3-biases": qwen3(**COMMON, head_dim=32, attention_bias=True),
        "gemma2": gemma2(**COMMON, **GEMMA),
        "gemma2-odd": gemma2(
            **{
                **COMMON,
                **GEMMA,
                "num_hidden_layers": 4,
                "num_key_value_heads": 4,
                "head_dim": 48,
                "final_logit_softcapping": None,
            },
            attention_bias=True,
            tie_word_embeddings=False,
        ),
        "smollm3": smollm3(**COMMON, pad_token_id=0, no_rope_layer_interval=2),
        "smollm3-odd": smollm3(
            **{**COMMON, "num_hidden_layers": 5, "hidden_size": 96, "num_attention_heads": 6},
            pad_token_id=0,
            attention_bias=True,
            mlp_bias=True,
            use_sliding_window=True,
            sliding_window=20,
            no_rope_layers=[0, 1, 0, 1, 1, 0],
            tie_word_embeddings=False,
        ),
        "granite": granite(**COMMON, **GRANITE, tie_word_embeddings=True),
        "granite-odd": granite(
            **{**COMMON, **GRANITE, "num_key_value_heads": 4, "residual_multiplier": 0.22},
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=YARN_ROPE,
        ),
        "olmo2": olmo2(**COMMON, pad_token_id=0),
        "olmo2-odd": olmo2(
            **{**COMMON, "num_key_value_heads": 1, "hidden_size": 192},
            pad_token_id=0,
            attention_bias=True,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
        ),
        "olmo3": olmo3(**{**COMMON, "num_hidden_layers": 5}, pad_token_id=0, sliding_window=20),
        "olmo3-odd": olmo3(
            **COMMON,
            pad_token_id=0,
            sliding_window=17,
            attention_bias=True,
            layer_types=[FULL, WINDOWED, FULL],
            rope_parameters={FULL: YARN_ROPE, WINDOWED: {"rope_type": "default", "rope_theta": 300.0}},
        ),
        "phi3": phi3(**COMMON, pad_token_id=0),
        "phi3-long": phi3(
            **{**COMMON, "num_key_value_heads": 4},
            pad_token_id=0,
            sliding_window=24,
            tie_word_embeddings=True,
            original_max_position_embeddings=32,
            rope_parameters=longrope(8),
        ),
        "phi3-part": phi3(
            **{**COMMON, "hidden_size": 128},
            pad_token_id=0,
            original_max_position_embeddings=64,
            partial_rotary_factor=0.75,
            rope_parameters=longrope(12),
        ),
        "gemma3": gemma3(
            **{**COMMON, "num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=24, sliding_window=20
        ),
        "gemma3-odd": gemma3(
            **{**COMMON, "num_key_value_heads": 1},
            head_dim=48,
            query_pre_attn_scalar=10,
            sliding_window=17,
            layer_types=[FULL, WINDOWED, FULL],
            rope_parameters={FULL: LINEAR_ROPE, WINDOWED: {"rope_type": "default", "rope_theta": 300.0}},
            final_logit_softcapping=3.0,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
        "gemma3-multimodal": transformers.Gemma3Config(
            text_config=gemma3(**COMMON, head_dim=32, sliding_window=20, layer_types=[WINDOWED, FULL, WINDOWED]),
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
            initializer_range=0.2,
        ),
        "gemma4": gemma4(
            **{**COMMON, **GEMMA4, "num_hidden_layers": 8},
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            layer_types=[WINDOWED, WINDOWED, FULL, WINDOWED, FULL, WINDOWED, WINDOWED, FULL],
            hidden_size_per_layer_input=16,
            final_logit_softcapping=3.0,
        ),
        "gemma4-odd": gemma4(
            **{**COMMON, **GEMMA4, "head_dim": 48, "sliding_window": 17, "global_head_dim": 80},
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            layer_types=[FULL, WINDOWED, FULL],
            rope_parameters={FULL: PROPORTIONAL_ROPE, WINDOWED: LINEAR_ROPE},
            hidden_size_per_layer_input=0,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
        "gemma4-moe": gemma4(
            **COMMON,
            **GEMMA4,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            layer_types=[WINDOWED, WINDOWED, FULL],
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=5,
            top_k_experts=3,
            moe_intermediate_size=48,
        ),
        "gemma4-multimodal": transformers.Gemma4Config(
            text_config=gemma4(
                **COMMON,
                **GEMMA4,
                hidden_size_per_layer_input=32,
                num_kv_shared_layers=1,
                layer_types=[WINDOWED, FULL, FULL],
            ),
            vision_config=transformers.Gemma4VisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                position_embedding_size=64,
            ),
            initializer_range=0.2,
        ),
        "gemma4-unified": transformers.Gemma4UnifiedTextConfig(**COMMON, **UNIFIED, attention_k_eq_v=True),
        "gemma4-unified-multimodal": transformers.Gemma4UnifiedConfig(
            text_config=transformers.Gemma4UnifiedTextConfig(**COMMON, **UNIFIED),
            vision_config=transformers.Gemma4UnifiedVisionConfig(
                mm_embed_dim=64, output_proj_dims=64, mm_posemb_size=8
            ),
            initializer_range=0.2,
        ),
        "qwen3-moe": qwen3_moe(**COMMON, **EXPERTS, head_dim=32, norm_topk_prob=True),
        "qwen3-moe-odd": qwen3_moe(
            **COMMON,
            **ODD_EXPERTS,
            head_dim=32,
            attention_bias=True,
            mlp_only_layers=[0],
            tie_word_embeddings=True,
        ),
        "qwen3-moe-step": qwen3_moe(**COMMON, **EXPERTS, decoder_sparse_step=2, norm_topk_prob=False),
        "qwen2-moe": qwen2_moe(**COMMON, **EXPERTS, shared_expert_intermediate_size=80, norm_topk_prob=True),
        "qwen2-moe-odd": qwen2_moe(
            **COMMON,
            **ODD_EXPERTS,
            shared_expert_intermediate_size=16,
            qkv_bias=False,
            decoder_sparse_step=2,
            mlp_only_layers=[0],
            tie_word_embeddings=True,
        ),
        "qwen3.5": qwen3_5(**{**COMMON, "num_hidden_layers": 5, "initializer_range": 0.05}, **DELTA, head_dim=32),
        "qwen3.5-odd": qwen3_5(
            **{**COMMON, "num_key_value_heads": 1},
            **ODD_DELTA,
            head_dim=48,
            attention_bias=True,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 4, 4],
                "mrope_interleaved": True,
            },
        ),
        "qwen3.5-moe": qwen3_5_moe(
            **{**COMMON, "num_hidden_layers": 4},
            **DELTA,
            **EXPERTS,
            shared_expert_intermediate_size=80,
            head_dim=32,
        ),
        "qwen3.5-moe-odd": qwen3_5_moe(
            **COMMON,
            **ODD_DELTA,
            **ODD_EXPERTS,
            shared_expert_intermediate_size=16,
            tie_word_embeddings=True,
        ),
        "qwen3.5-multimodal": transformers.Qwen3_5Config(
            text_config={**COMMON, **DELTA, "head_dim": 32, "initializer_range": 0.05, "full_attention_interval": 2},
            vision_config=QWEN_VISION,
            tie_word_embeddings=True,
        ),
        "qwen3.5-moe-multimodal": transformers.Qwen3_5MoeConfig(
            text_config={**COMMON, **ODD_DELTA, **EXPERTS, "shared_expert_intermediate_size": 80},
            vision_config=QWEN_VISION,
        ),
        "qwen3-next": qwen3_next(
            **{**COMMON, "num_hidden_layers": 4},
            **DELTA,
            **EXPERTS,
            shared_expert_intermediate_size=80,
            head_dim=32,
            mlp_only_layers=[1],
        ),
        "qwen3-next-odd": qwen3_next(
            **COMMON,
            **ODD_DELTA,
            **ODD_EXPERTS,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=2,
            norm_topk_prob=False,
            tie_word_embeddings=True,
        ),
        "glm": glm(**COMMON, head_dim=32, pad_token_id=0),
        "glm4": glm4(**COMMON, head_dim=32, pad_token_id=0),
        "glm4-odd": glm4(
            **{**COMMON, "num_key_value_heads": 4},
            head_dim=48,
            pad_token_id=0,
            partial_rotary_factor=0.25,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
        "glm4-moe": glm4_moe(
            **COMMON,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            n_group=4,
            topk_group=2,
            use_qk_norm=True,
            routed_scaling_factor=2.5,
            head_dim=32,
        ),
        "glm4-moe-odd": glm4_moe(
            **COMMON,
            n_routed_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            n_shared_experts=2,
            first_k_dense_replace=2,
            norm_topk_prob=False,
            attention_bias=True,
            partial_rotary_factor=1.0,
            tie_word_embeddings=True,
        ),
        "gpt-oss": gpt_oss(
            **{**COMMON, "num_hidden_layers": 4},
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=20,
            rope_parameters={**YARN_ROPE, "truncate": False},
        ),
        "gpt-oss-odd": gpt_oss(
            **{**COMMON, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 48},
            head_dim=48,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=17,
            layer_types=[FULL, WINDOWED, FULL],
            attention_bias=False,
            tie_word_embeddings=True,
        ),
        "mixtral": mixtral(**COMMON, num_local_experts=8, num_experts_per_tok=2),
        "mixtral-odd": mixtral(
            **COMMON, num_local_experts=5, num_experts_per_tok=3, sliding_window=20, tie_word_embeddings=True
        ),
    }


@pytest.fixture(scope="session")
def variants() -> list[str]:
    """The names that `config_of` and `checkpoints` know."""
    return list(tiny_configs())


@pytest.fixture
def config_of() -> Callable[[str], dict[str, Any]]:
    """name → what transformers writes as its config.json"""

    def of(name: str) -> dict[str, Any]:
        config = tiny_configs()[name]
        mapping = (
            transformers.MODEL_FOR_CAUSAL_LM_MAPPING if not hasattr(config, "vision_config")
            else transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        )  # fmt: skip
        return config.to_dict() | {"architectures": [mapping[type(config)].__name__]}

    return of


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: Any
    """the transformers model that was saved, in float32"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """name → checkpoint, made on first use."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[[transformers.PretrainedConfig, Path], Checkpoint]:
    """A config, and the folder for a checkpoint of it."""
    return _saved


def _make(name: str, folder: Path) -> Checkpoint:
    return _saved(tiny_configs()[name], folder)


def _saved(config: transformers.PretrainedConfig, folder: Path) -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        auto = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
        model = (auto or transformers.AutoModelForCausalLM).from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        for parameter_name, parameter in model.named_parameters():
            # norms and biases would otherwise be ones and zeros, and a forgotten one invisible
            if parameter_name.endswith(".bias") or "norm" in parameter_name:
                # the norms of Qwen3.5 are times 1 + the weight; twice as much, its layers amplify rounding
                is_offset = (
                    type(model).__name__.startswith(("Qwen3_5", "Qwen3Next")) and "linear_attn" not in parameter_name
                )
                torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name and not is_offset else 0.0, 0.3)
            if parameter_name.endswith(("router.scale", "per_expert_scale")):
                torch.nn.init.normal_(parameter, 1.0, 0.3)
            # so large that the activations are clamped, and that heads differ
            if parameter_name.endswith(("proj_bias", "sinks")):
                torch.nn.init.normal_(parameter, 0.0, 4.0 if "gate_up" in parameter_name else 1.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("e_score_correction_bias", "layer_scalar")):
                torch.nn.init.normal_(buffer, 1.0 if "scalar" in buffer_name else 0.0, 0.3)
    model.eval().save_pretrained(folder)
    return Checkpoint(folder, model)


@dataclass
class Finished:
    """What a request got over its steps."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobRows] = field(default_factory=list)
    prompt_logprobs: list[LogprobRows] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    pooled: bytes | None = None


@dataclass(frozen=True)
class Prompt:
    """A request, and how its prompt is cut: tokens per step, the last one repeated."""

    request_id: str
    token_ids: list[int]
    params: SamplingSpec
    seed: int = 0
    chunks: tuple[int, ...] = (10_000,)
    num_prompt_tokens: int | None = None
    prompt_logprobs_start: int = 0
    pooling: PoolingSpec | None = None
    adapter: AdapterSpec | None = None


class ServingWorker:
    """A worker after start_serving, and a scheduler just large enough to drive it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = worker_config(folder, **settings)
        self.worker = Worker()
        self.loaded: ModelLoaded = self.worker.load_model(LoadModel(config=config))
        self.num_blocks = min(self.loaded.available_kv_blocks, 64)
        self.num_slots = min(self.loaded.available_state_slots, 16)
        start = StartServing(num_blocks=self.num_blocks, num_state_slots=self.num_slots)
        self.ready: WorkerReady = self.worker.start_serving(start)
        self.block_size = self.loaded.block_size
        # from the top down, so that block order differs from position order
        self._free_blocks = list(range(self.num_blocks))
        self._step_id = 0

    def step(
        self,
        scheduled: list[ScheduledRequest],
        new: list[NewRequest] | None = None,
        finished: list[str] | None = None,
    ) -> list[SampledTokens]:
        self._step_id += 1
        command = ExecuteStep(
            step_id=self._step_id,
            new_requests=new or [],
            scheduled=scheduled,
            finished_request_ids=finished or [],
        )
        self.worker.submit(command)
        result = self.worker.collect()
        assert result.step_id == self._step_id
        assert [item.request_id for item in result.sampled] == [item.request_id for item in scheduled]
        return result.sampled

    def run(self, *prompts: Prompt) -> dict[str, Finished]:
        """All prompts side by side until each has its `max_tokens`, then forget them."""
        done = {prompt.request_id: Finished() for prompt in prompts}
        computed = dict.fromkeys(done, 0)
        tables: dict[str, list[int]] = {request_id: [] for request_id in done}
        chunks = {prompt.request_id: list(prompt.chunks) for prompt in prompts}
        new = [self.new_request(prompt) for prompt in prompts]
        while True:
            scheduled = []
            for slot, prompt in enumerate(prompts):
                request_id, outcome = prompt.request_id, done[prompt.request_id]
                is_done = outcome.pooled is not None or len(outcome.token_ids) >= prompt.params.max_tokens
                if is_done or outcome.errors:
                    continue
                known = len(prompt.token_ids) + len(outcome.token_ids)
                left = known - computed[request_id]
                cut = chunks[request_id]
                amount = min(left, cut.pop(0) if len(cut) > 1 else cut[0])
                scheduled.append(
                    ScheduledRequest(
                        request_id=request_id,
                        num_computed_tokens=computed[request_id],
                        num_tokens=amount,
                        block_table_start=len(tables[request_id]),
                        block_ids=self._grow(tables[request_id], computed[request_id] + amount),
                        prompt_logprobs_start=prompt.prompt_logprobs_start,
                        state_read=slot if self.num_slots and computed[request_id] else -1,
                        state_writes=[(amount - 1, slot)] if self.num_slots else [],
                    )
                )
                computed[request_id] += amount
            if not scheduled:
                break
            for result in self.step(scheduled, new):
                _record(done[result.request_id], result)
            new = []
        self.step([], finished=list(done))
        for table in tables.values():
            self._free_blocks.extend(table)
        return done

    @staticmethod
    def new_request(prompt: Prompt) -> NewRequest:
        return NewRequest(
            request_id=prompt.request_id,
            token_ids=prompt.token_ids,
            num_prompt_tokens=prompt.num_prompt_tokens or len(prompt.token_ids),
            seed=prompt.seed,
            params=prompt.params,
            pooling=prompt.pooling,
            adapter=prompt.adapter,
        )

    def _grow(self, table: list[int], num_tokens: int) -> list[int]:
        added = [self._free_blocks.pop() for _ in range(-(-num_tokens // self.block_size) - len(table))]
        table.extend(added)
        return added


def _record(outcome: Finished, result: SampledTokens) -> None:
    outcome.token_ids.extend(result.token_ids)
    if result.logprobs is not None:
        outcome.logprobs.append(result.logprobs)
    if result.prompt_logprobs is not None:
        outcome.prompt_logprobs.append(result.prompt_logprobs)
    if result.pooled is not None:
        outcome.pooled = result.pooled
    if result.error is not None:
        outcome.errors.append(result.error.message)


@pytest.fixture
def serve() -> Iterator[Callable[..., ServingWorker]]:
    """folder, settings → a serving worker; all are shut down at the end."""
    workers: list[ServingWorker] = []

    def start(folder: Path, **settings: Any) -> ServingWorker:
        workers.append(ServingWorker(folder, **settings))
        return workers[-1]

    yield start
    for serving in workers:
        serving.worker.shutdown()


def dense_logprobs(parts: list[LogprobRows], vocab_size: int) -> torch.Tensor:
    """[rows, vocab_size] in id order, from rows that report the whole vocabulary."""
    rows = []
    for part in parts:
        ids = np.frombuffer(part.token_ids, "<i4").reshape(part.num_rows, part.width)
        values = np.frombuffer(part.logprobs, "<f4").reshape(part.num_rows, part.width)
        dense = np.full((part.num_rows, vocab_size), np.nan, np.float32)
        np.put_along_axis(dense, ids.astype(np.int64), values, axis=1)
        rows.append(torch.from_numpy(dense))
    return torch.cat(rows)


@pytest.fixture
def dense() -> Callable[[list[LogprobRows], int], torch.Tensor]:
    return dense_logprobs


@pytest.fixture
def prompt() -> type[Prompt]:
    return Prompt
