"""The tokenizer inside a GGUF file → tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from sempre.engine.models.gguf_metadata import GgufMetadata
from sempre.engine.models.gguf_pre_tokenizers import PRE_TOKENIZERS

_IDS = {
    "bos": "bos",
    "eos": "eos",
    "pad": "padding",
    "unk": "unknown",
    "sep": "seperator",  # so spelled in GGUF
    "mask": "mask",
    "cls": "cls",
}
# further tokens that end an output
_ENDS = ("eot", "eom")
# of tasks that the engine does not have, and of prompts that a client writes
_UNUSED = (
    *(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"tokenizer.ggml.{part}_token_id" for part in ("prefix", "suffix", "middle")),
    "tokenizer.ggml.token_type_count",
)
_SPACE = "▁"


class _TokenType(IntEnum):
    """Numbers from the GGUF specification."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenizerFacts(NamedTuple):
    """What config.json and generation_config.json need of a tokenizer."""

    num_tokens: int
    special_ids: dict[str, int]
    """`bos_token_id` and the like"""
    eos_ids: list[int]
    """all tokens that end an output"""


def write_tokenizer(metadata: GgufMetadata, folder: Path, *, context_length: int) -> TokenizerFacts:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Converted are byte-level BPE (`tokenizer.ggml.model` = "gpt2") and SentencePiece's merges by score ("llama").
    Raises ModelError naming the field that does not fit.
    """
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    special_ids = _special_ids(metadata, len(tokens))
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id", int) for end in _ENDS]
    for field in _UNUSED:
        metadata.get(field, int)
    kind = metadata.require("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer, begins = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer, begins = _pieces(metadata, tokens), True
    else:
        metadata.fail("tokenizer.ggml.model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)", kind)
    stated = metadata.get("tokenizer.ggml.add_bos_token", bool)
    _frame(
        metadata,
        tokenizer,
        special_ids,
        {"bos": begins if stated is None else stated, "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", bool))},
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, object] = {
        # This class uses tokenizer.json unchanged; a model's own class would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    config.update({name.removesuffix("_id"): tokens[token_id] for name, token_id in special_ids.items()})
    template = _chat_template(metadata)
    if template is not None:
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    eos = [special_ids.get("eos_token_id"), *ends]
    known = [token_id for token_id in dict.fromkeys(eos) if token_id is not None and 0 <= token_id < len(tokens)]
    return TokenizerFacts(len(tokens), special_ids, known)


def _special_ids(metadata: GgufMetadata, num_tokens: int) -> dict[str, int]:
    found = {}
    for ours, theirs in _IDS.items():
        field = f"tokenizer.ggml.{theirs}_token_id"
        token_id = metadata.get(field, int)
        # files say so of a token that does not exist
        if token_id in (None, -1, 2**32 - 1):
            continue
        if not 0 <= token_id < num_tokens:
            metadata.fail(field, f"an id below {num_tokens}", token_id)
        found[f"{ours}_token_id"] = token_id
    return found


def _chat_template(metadata: GgufMetadata) -> object:
    """A template, or a list of named ones."""
    default = metadata.get("tokenizer.chat_template", str)
    if "tokenizer.chat_templates" not in metadata:
        return default
    named = {"default": default} if default is not None else {}
    for name in metadata.items("tokenizer.chat_templates", str):
        named[name] = metadata.require(f"tokenizer.chat_template.{name}", str)
    return [{"name": name, "template": template} for name, template in named.items()]


def _byte_level(metadata: GgufMetadata, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether its texts begin with bos where the file does not say."""
    name = metadata.require("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        metadata.fail("tokenizer.ggml.pre", f"one of {', '.join(map(repr, PRE_TOKENIZERS))}", name)
    metadata.expect("tokenizer.ggml.add_space_prefix", False, default=False)
    metadata.get("tokenizer.ggml.scores", list)  # ranks come from the merges; scores are unused padding here
    pre = PRE_TOKENIZERS[name]
    vocabulary = _vocabulary(metadata, tokens)
    merges: list[tuple[str, str]] = []
    for rank, merge in enumerate(metadata.items("tokenizer.ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            metadata.fail(f"tokenizer.ggml.merges: item {rank}", "two known tokens that make a known one", merge)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    tokenizer.pre_tokenizer = pre.build()
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in _typed(metadata, tokens):
        if kind == _TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        elif kind == _TokenType.BYTE:
            metadata.fail("tokenizer.ggml.token_type", "no byte tokens in a byte-level vocabulary", token)
    return tokenizer, pre.begins


def _pieces(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE: the neighbours whose union has the best score are merged first; other characters are
    bytes."""
    metadata.get("tokenizer.ggml.pre", str)
    metadata.expect("tokenizer.ggml.remove_extra_whitespaces", False, default=False)
    metadata.expect("tokenizer.ggml.precompiled_charsmap", [], default=[])
    vocabulary = _vocabulary(metadata, tokens)
    scores = metadata.items("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        metadata.fail("tokenizer.ggml.scores", f"{len(tokens)} numbers", len(scores))
    typed = list(_typed(metadata, tokens))
    unknown = [token for token, kind in typed if kind == _TokenType.UNKNOWN]
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_by_score(vocabulary, scores),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    tokenizer = Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", bool) is not False
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    undone: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.insert(0, normalizers.Prepend(_SPACE))
        undone.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undone)
    for token, kind in typed:
        if kind in (_TokenType.CONTROL, _TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _TokenType.USER_DEFINED:
            # one of spaces is looked for after they are replaced; a prefix would become part of it
            replaced = _SPACE in token and not prefixed
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=replaced)])
    return tokenizer


def _merges_by_score(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those of the best score first, then of the lowest ids."""
    found = []
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[token_id], vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _vocabulary(metadata: GgufMetadata, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        metadata.fail("tokenizer.ggml.tokens", "each token once", f"{len(tokens) - len(vocabulary)} that appear again")
    return vocabulary


def _typed(metadata: GgufMetadata, tokens: list[str]) -> list[tuple[str, int]]:
    kinds = metadata.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        metadata.fail("tokenizer.ggml.token_type", f"{len(tokens)} entries", len(kinds))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind not in set(_TokenType):
            metadata.fail("tokenizer.ggml.token_type", f"one of {[int(t) for t in _TokenType]}", f"{kind} of {token!r}")
    return list(zip(tokens, kinds, strict=True))


def _frame(
    metadata: GgufMetadata, tokenizer: Tokenizer, special_ids: Mapping[str, int], added: Mapping[str, bool]
) -> None:
    """Put bos before, and eos after, each text."""
    ids = {}
    for name, is_added in added.items():
        if not is_added:
            continue
        if f"{name}_token_id" not in special_ids:
            metadata.fail(f"tokenizer.ggml.{name}_token_id", f"an id, as add_{name}_token is true", None)
        ids[name] = special_ids[f"{name}_token_id"]
    if ids:
        tokens = {name: tokenizer.id_to_token(token_id) for name, token_id in ids.items()}
        before, after = ([tokens[name]] if name in tokens else [] for name in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=list({tokens[name]: token_id for name, token_id in ids.items()}.items()),
        )
