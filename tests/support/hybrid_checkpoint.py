"""A small model of layers that keep states and layers of attention, with the tokenizer of `tiny`; its weights are
dummies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sempre.engine.arguments import engine_config

CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
# keys and values of one layer, 2 heads, 64 dimensions, 16 tokens, bfloat16
KV_BLOCK_BYTES = 2 * 2 * 64 * 16 * 2
# three layers, 4 states of 32 times 32 and the last 3 inputs of 256 channels, float32
SLOT_BYTES = 3 * 4 * (4 * 32 * 32 + 3 * 256)


def write_hybrid_checkpoint(folder: Path) -> Path:
    """The folder, which now has a config and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny = Path(engine_config("tiny").model_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    return folder


def hybrid_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of an engine of this model. `num_blocks` and `num_slots` are the sizes of its caches."""
    size = {}
    if "num_blocks" in settings:
        size["kv_cache_memory_bytes"] = cache_bytes(
            settings.pop("num_blocks"), settings.pop("num_slots"), settings["max_num_seqs"]
        )
    defaults = {"model": str(folder), "load_format": "dummy", "max_model_len": 384, "num_threads": 1}
    return {**defaults, **size, **settings}


def cache_bytes(num_blocks: int, num_slots: int, max_num_seqs: int) -> int:
    """A `kv_cache_memory_bytes` of at least so many blocks and of just so many slots, a quarter of what the requests'
    own leave being for further ones."""
    spare = num_slots - max_num_seqs
    assert num_blocks * KV_BLOCK_BYTES <= 4 * (spare + 1) * SLOT_BYTES, "more slots would be taken"
    return max_num_seqs * SLOT_BYTES + max(4 * spare * SLOT_BYTES, num_blocks * KV_BLOCK_BYTES + spare * SLOT_BYTES)
