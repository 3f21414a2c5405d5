"""CPU time per parameter of every model family, in one process on one core.

Each family has a small shape of the same width, depth and heads, with dummy weights in float32. Metric: CPU time of the
process per token, divided by the parameters that a token is multiplied by (of experts those that are chosen; embeddings
are looked up), relative to Llama: 1.10 is ten per cent slower per parameter. Decode: one request, tokens after a short
prompt. Prefill: one prompt. The families take turns, and the fastest of the rounds counts; CPU time, not wall clock:
other processes may run, and what they slow down is not the family's doing.

    python benchmarks/cpu_families.py --rounds 7

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from sempre.engine import LLM, SamplingParams
from sempre.engine.version import __version__

COMMON = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 704}
DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
WIDE = {"head_dim": 64, "global_head_dim": 64, "sliding_window": 512, "hidden_size_per_layer_input": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 512}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Gemma 2": ("Gemma2ForCausalLM", {"sliding_window": 512}),
    "Gemma 3": ("Gemma3ForCausalLM", {"sliding_window": 512}),
    "Gemma 4": ("Gemma4ForCausalLM", WIDE),
    "Phi-3": ("Phi3ForCausalLM", {}),
    "SmolLM3": ("SmolLM3ForCausalLM", {}),
    "Granite": ("GraniteForCausalLM", {}),
    "OLMo 2": ("Olmo2ForCausalLM", {}),
    "OLMo 3": ("Olmo3ForCausalLM", {"sliding_window": 512}),
    "GLM-4": ("Glm4ForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 8, "intermediate_size": 704}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 704}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", EXPERTS),
    "GLM-4.5": ("Glm4MoeForCausalLM", {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 704, "num_nextn_predict_layers": 0,
    }),
    "gpt-oss": ("GptOssForCausalLM", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 704, "sliding_window": 128,
    }),
    "Qwen3.5": ("Qwen3_5ForCausalLM", DELTA),
    "Qwen3.5-MoE": ("Qwen3_5MoeForCausalLM", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 704}),
}  # fmt: skip
PROMPT, OUTPUT, PREFILL = 8, 48, 512


def multiplied(config: Any, architecture: str) -> int:
    """The parameters that a token is multiplied by."""
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    count = 0
    chosen, experts = (getattr(config, name, 1) for name in ("num_experts_per_tok", "num_experts"))
    experts = getattr(config, "n_routed_experts", getattr(config, "num_local_experts", experts))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            count += parameter.numel() * chosen // experts
        elif "embed_tokens" not in name:
            count += parameter.numel()
    return count


class Family:
    """One model, loaded."""

    def __init__(self, name: str, folder: Path, engines: ExitStack) -> None:
        self.name = name
        architecture, changes = FAMILIES[name]
        config = getattr(transformers, architecture).config_class(**{**COMMON, **changes})
        self.parameters = multiplied(config, architecture)
        folder.mkdir()
        written = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(written))
        self.llm = engines.enter_context(LLM(
            str(folder), load_format="dummy", dtype="float32", skip_tokenizer_init=True, multiprocessing=False,
            num_threads=1, max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=PREFILL,
            enable_prefix_caching=False,
        ))  # fmt: skip
        self.decode: list[float] = []
        self.prefill: list[float] = []

    def _seconds(self, prompt_len: int, output_len: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [3 + (i * 37) % 8000 for i in range(prompt_len)]}
        before = time.process_time()
        self.llm.generate([prompt], params, use_tqdm=False)
        return time.process_time() - before

    def measure(self) -> None:
        """One round: picoseconds per token and parameter."""
        scale = 1e12 / self.parameters
        short = self._seconds(PROMPT, 1)
        self.decode.append((self._seconds(PROMPT, 1 + OUTPUT) - short) / OUTPUT * scale)
        self.prefill.append((self._seconds(PREFILL, 1) - short) / PREFILL * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, ExitStack() as engines:
        families = [Family(name, Path(root) / str(place), engines) for place, name in enumerate(options.families)]
        for _ in range(options.rounds):
            for family in families:
                family.measure()
    found = {
        family.name: {
            "million_parameters": round(family.parameters / 1e6, 1),
            "decode": min(family.decode),
            "prefill": min(family.prefill),
        }
        for family in families
    }
    base = found[families[0].name]
    print(f"| family | parameters | decode, ps/parameter | of {families[0].name} | prefill | of {families[0].name} |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        ratios = [f"{row[kind]:.1f} | {row[kind] / base[kind]:.2f}" for kind in ("decode", "prefill")]
        print(f"| {name} | {row['million_parameters']} M | {' | '.join(ratios)} |")
    facts = {"machine": platform.processor() or platform.machine(), "version": __version__, "torch": torch.__version__}
    print(json.dumps({"facts": facts, "rounds": options.rounds, "families": found}))


if __name__ == "__main__":
    main()
