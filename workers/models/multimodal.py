"""Checkpoints that understand images too: their text part is a section of the config, and tensors of some prefix."""

from __future__ import annotations

from sempre.workers.config_fields import ConfigFields
from sempre.workers.tensor_source import ModelPart

# stated beside the section, for all parts
COMMON_FIELDS = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")
_TOWERS = ("visual.", "vision_tower.", "audio_tower.", "multi_modal_projector.", "embed_vision.", "embed_audio.")
_UNIFIED = ("vision_embedder.", "audio_embedder.")
TEXT_PART = ModelPart(
    {"model.language_model.": "model.", "language_model.": ""},
    tuple(prefix + tower for prefix in ("", "model.") for tower in (*_TOWERS, *_UNIFIED)),
)


def text_part(config: ConfigFields, *, tied_by_default: bool) -> ConfigFields:
    """The section of the text part, with the common fields. Raises ModelError."""
    if config.raw.get("text_config") is None:
        config.fail("text_config", "an object", None)
    text = config.section("text_config")
    stated = {name: config.raw[name] for name in COMMON_FIELDS if config.raw.get(name) is not None}
    tied = config.boolean("tie_word_embeddings", default=tied_by_default)
    return ConfigFields({**text.raw, **stated, "tie_word_embeddings": tied}, text.source)
