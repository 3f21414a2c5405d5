"""The tokenizer inside a GGUF file → tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sempre.engine.models.gguf_metadata import GGUFMetadata
from sempre.ipc.errors import ModelError


class _TokenType(IntEnum):
    """Token types in byte-level BPE vocabularies; numbers from the GGUF specification."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = MappingProxyType(
    {"gpt-2": _byte_level, "smollm": _digits_then_byte_level}
)


def special_token_ids(metadata: GGUFMetadata) -> dict[str, int]:
    """Return `bos_token_id`, `eos_token_id`, `pad_token_id`, `unk_token_id` if the file has them."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {
        f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id", int) for ours, theirs in names.items()
    }
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def write_tokenizer(metadata: GGUFMetadata, folder: Path, *, context_length: int) -> int:
    """Write tokenizer.json and tokenizer_config.json into `folder`; return the number of tokens.

    Only byte-level BPE (`tokenizer.ggml.model` = "gpt2") is converted. Raises ModelError naming the field that
    does not fit.
    """
    metadata.expect("tokenizer.ggml.model", "gpt2", default=None)
    metadata.expect("tokenizer.ggml.add_space_prefix", False, default=False)
    metadata.expect("tokenizer.ggml.add_eos_token", False, default=False)
    metadata.get("tokenizer.ggml.scores", list)  # BPE ranks come from the merges; scores are unused padding here
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    special_ids = special_token_ids(metadata)
    for name, token_id in special_ids.items():
        if not 0 <= token_id < len(tokens):
            raise ModelError(f"GGUF field for {name}: expected an id below {len(tokens)}, found {token_id}.")
    tokenizer = _build(metadata, tokens)
    if metadata.get("tokenizer.ggml.add_bos_token", bool):
        _prepend_bos(tokenizer, tokens, special_ids)
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, object] = {
        # This class uses tokenizer.json unchanged; a model's own class would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    config.update({name.removesuffix("_id"): tokens[token_id] for name, token_id in special_ids.items()})
    chat_template = metadata.get("tokenizer.chat_template", str)
    if chat_template is not None:
        config["chat_template"] = chat_template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return len(tokens)


def _build(metadata: GGUFMetadata, tokens: list[str]) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"GGUF field 'tokenizer.ggml.tokens': {len(tokens) - len(vocabulary)} tokens appear twice.")
    merges: list[tuple[str, str]] = []
    for rank, merge in enumerate(metadata.items("tokenizer.ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ModelError(f"GGUF field 'tokenizer.ggml.merges': merge {rank} {merge!r} is not made of known tokens.")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pre = metadata.require("tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"GGUF field 'tokenizer.ggml.pre': expected one of {', '.join(map(repr, _PRE_TOKENIZERS))}, found {pre!r}."
        )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _mark_added_tokens(tokenizer, tokens, metadata.items("tokenizer.ggml.token_type", int))
    return tokenizer


def _mark_added_tokens(tokenizer: Tokenizer, tokens: list[str], token_types: list[int]) -> None:
    if len(token_types) != len(tokens):
        raise ModelError(
            f"GGUF field 'tokenizer.ggml.token_type': expected {len(tokens)} entries, found {len(token_types)}."
        )
    for token_id, (token, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if kind == _TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        elif kind != _TokenType.NORMAL:
            raise ModelError(
                f"GGUF field 'tokenizer.ggml.token_type': token {token_id} {token!r} has type {kind}; "
                f"expected one of {[int(t) for t in _TokenType]} in a byte-level vocabulary."
            )


def _prepend_bos(tokenizer: Tokenizer, tokens: list[str], special_ids: Mapping[str, int]) -> None:
    if "bos_token_id" not in special_ids:
        raise ModelError(
            "GGUF field 'tokenizer.ggml.add_bos_token' is true, but 'tokenizer.ggml.bos_token_id' is missing."
        )
    bos_id = special_ids["bos_token_id"]
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
    )
