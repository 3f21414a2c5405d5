"""What sentence-transformers' files say beside their modules: stored prompts, similarity, the longest sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from sempre.ipc.config import Similarity
from sempre.ipc.model_files import read_json_object
from sempre.workers.config_fields import ConfigFields

CONFIG, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
_MAX_PROMPTS = 1024
# older names
_SIMILARITIES: dict[str, Similarity] = {"cos_sim": "cosine", "dot_score": "dot"}
_SIMILARITIES |= {name: name for name in get_args(Similarity)}


@dataclass(frozen=True)
class SentenceFiles:
    """What they state; a model without such files states nothing."""

    prompts: dict[str, str] = field(default_factory=dict)
    """by name: what comes before a text"""
    default_prompt_name: str | None = None
    """of texts for which a request names none"""
    similarity: Similarity = "cosine"
    """of two embeddings"""
    max_length: int | None = None
    """tokens of the longest sequence it was trained for"""


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Raises ModelError naming file and field."""
    config, transformer = _read(folder / CONFIG), _read(folder / TRANSFORMER)
    if transformer.boolean("do_lower_case", default=False):
        transformer.fail("do_lower_case", "false: texts are encoded as they are", True)
    stated = transformer.raw.get("max_seq_length")
    prompts = _prompts(config)
    name = config.raw.get("default_prompt_name")
    if name is not None and name not in prompts:
        config.fail("default_prompt_name", f"a name among prompts: {', '.join(prompts) or 'there is none'}", name)
    similarity = config.raw.get("similarity_fn_name") or "cosine"
    if similarity not in _SIMILARITIES:
        config.fail("similarity_fn_name", f"one of {', '.join(_SIMILARITIES)}", similarity)
    return SentenceFiles(
        prompts,
        None if name is None else str(name),
        _SIMILARITIES[str(similarity)],
        None if stated is None else transformer.positive("max_seq_length"),
    )


def _read(path: Path) -> ConfigFields:
    return ConfigFields(read_json_object(path) if path.exists() else {}, path.name)


def _prompts(config: ConfigFields) -> dict[str, str]:
    stated = config.section("prompts").raw
    if len(stated) > _MAX_PROMPTS or not all(isinstance(text, str | None) for text in stated.values()):
        config.fail("prompts", f"a text for each of at most {_MAX_PROMPTS} names", stated)
    return {name: str(text or "") for name, text in stated.items()}
