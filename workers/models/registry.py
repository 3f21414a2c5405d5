"""Which file describes which `architectures` entry of a config.json, and what such a file offers."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from sempre.ipc.errors import ModelError, UnknownArchitecture
from sempre.ipc.model_files import read_json_object
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.module import Build
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.pooling import CLASSIFIER, DECODER, GENERATOR, PoolingSettings, decoder_of, read_pooling

FILES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Mistral3ForConditionalGeneration": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "Qwen3NextForCausalLM": "qwen3_5",
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

# their attention looks both ways, so that what is computed of a token depends on the tokens after it
ENCODERS = (
    "Albert", "Bert", "Camembert", "Deberta", "DistilBert", "Electra", "Ernie", "Eurobert", "Gte", "JinaBert",
    "MPNet", "ModernBert", "NeoBert", "New", "NomicBert", "Roberta", "RoFormer", "T5", "XLM", "XLMRoberta",
)  # fmt: skip

BOTH_WAYS = "attention that looks both ways is not supported"

# what config.json may say of where a token's attention looks; "vision": both ways among those of an image, which the
# text part has none of
ONE_WAY: dict[str, tuple[object, ...]] = {"is_causal": (True,), "use_bidirectional_attention": (False, "vision")}


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


def _refuse_encoder(architecture: str) -> None:
    if architecture.startswith(ENCODERS) and not architecture.endswith("ForCausalLM"):
        raise UnknownArchitecture(
            f"config.json: architectures: expected a decoder, found {architecture!r}, an encoder: {BOTH_WAYS}. Models"
            " that embed or rank and are decoders are supported, for example Qwen3-Embedding and Qwen3-Reranker.",
            architecture=architecture,
        )


class KnownModels(NamedTuple):
    """What may be in the field `architectures`."""

    generate: list[str]
    pool: list[str]
    """beside those that generate, if their files say how they pool"""
    refused: dict[str, list[str]]
    """beginnings of names, by the reason"""


def known_models() -> KnownModels:
    """The architectures of this package."""
    families = [name.removesuffix(GENERATOR) for name in FILES if name.endswith(GENERATOR)]
    pooling = [family + ending for family in families for ending in (DECODER, CLASSIFIER)]
    return KnownModels(list(FILES), pooling, {BOTH_WAYS: list(ENCODERS)})


def load_spec(folder: Path, settings: PoolingSettings | None = None) -> ModelSpec:
    """The spec of the checkpoint in `folder`, which pools if its files or the `settings` say so.

    Raises ModelError or UnknownArchitecture, ConfigError for settings that do not fit.
    """
    if not folder.is_dir():
        raise ModelError(f"model_path: expected a checkpoint folder, found no folder at {folder}.")
    config = read_json_object(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.exists() else {}
    spec = parse_spec(config, generation)
    sizes = spec.hidden_size, spec.vocab_size
    pooling = read_pooling(folder, ConfigFields(config), sizes, settings or PoolingSettings())
    return spec if pooling is None else replace(spec, pooling=pooling)


def parse_spec(config: dict[str, object], generation_config: dict[str, object]) -> ModelSpec:
    """`config` is config.json, `generation_config` generation_config.json or empty."""
    fields = ConfigFields(config)
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        fields.fail("architectures", "a list of one architecture name", names)
    for name, one_way in ONE_WAY.items():
        value = fields.raw.get(name)
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in one_way):
            fields.fail(name, f"{str(one_way[0]).lower()}: {BOTH_WAYS}", value)
    _refuse_encoder(names[0])
    architecture = decoder_of(names[0])
    return family_of(architecture).parse(
        architecture, fields, ConfigFields(generation_config, "generation_config.json")
    )


def build_model(build: Build, spec: ModelSpec) -> CausalLM:
    """The tree of a model, without its tensors."""
    model = family_of(spec.architecture).build_model(build, spec)
    if spec.pooling is not None:
        model.pool(build)
    return model
