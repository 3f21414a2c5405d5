"""Which file describes which `architectures` entry of a config.json, and what such a file offers."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from sempre.ipc.errors import ModelError, UnknownArchitecture
from sempre.ipc.model_files import read_json_object
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec

FILES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "MixtralForCausalLM": "mixtral",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GptOssForCausalLM": "gpt_oss",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForCausalLM": "gemma4",
    "Gemma4UnifiedForConditionalGeneration": "gemma4",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
}


class Family(Protocol):
    """A file of this package."""

    def parse(self, architecture: str, fields: ConfigFields, generation: ConfigFields) -> ModelSpec:
        """The spec from config.json and generation_config.json. Raises ModelError naming the field."""

    def build_model(self, build: Build, spec: ModelSpec) -> CausalLM:
        """The tree of a spec that `parse` made."""


def family_of(architecture: str) -> Family:
    """Raises UnknownArchitecture, which lists the known ones."""
    if architecture not in FILES:
        near = get_close_matches(architecture, FILES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownArchitecture(
            f"config.json: architectures: no decoder for {architecture!r}.{hint} Known: {', '.join(FILES)}.",
            architecture=architecture,
        )
    return cast(Family, import_module(f"{__package__}.{FILES[architecture]}"))


def load_spec(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`; raises ModelError or UnknownArchitecture."""
    if not folder.is_dir():
        raise ModelError(f"model_path: expected a checkpoint folder, found no folder at {folder}.")
    config = read_json_object(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.exists() else {}
    return parse_spec(config, generation)


def parse_spec(config: dict[str, object], generation_config: dict[str, object]) -> ModelSpec:
    """`config` is config.json, `generation_config` generation_config.json or empty."""
    fields = ConfigFields(config)
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        fields.fail("architectures", "a list of one architecture name", names)
    return family_of(names[0]).parse(names[0], fields, ConfigFields(generation_config, "generation_config.json"))


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree of a model, without its tensors."""
    return family_of(spec.architecture).build_model(build, spec)
