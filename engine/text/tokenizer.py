"""Converts text to token ids and back, using the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sempre.engine.text.encoding import BatchEncoding, Padding, padded
from sempre.engine.text.tokenizer_files import eos_token_ids, named_tokens, read_json
from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.model_files import MAX_TOKENIZER_BYTES, check_regular

LONG_TEXT = 20_000
"""From this many characters, encoding takes milliseconds: an event loop should use a thread."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """Return the byte-level BPE alphabet: which character stands for which byte.

    The mapping of GPT-2 (Radford et al. 2019): printable Latin-1 characters stand for themselves, the remaining
    bytes for the characters from U+0100 on, in ascending order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    mapping = {chr(byte): byte for byte in printable}
    mapping.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return mapping


_BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """A model's tokenizer, with the methods and defaults of transformers.

    Thread-safe: after construction only caches change.
    """

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    makes_text = True
    """False if there is no tokenizer, only token ids."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap `backend`; `eos_token_ids` end an output in addition to `eos_token`.

        `folder` has the chat template, `config` is the content of its tokenizer_config.json. Raises ModelError when
        `bos_token` or `eos_token` is not in the vocabulary.
        """
        # A file may set padding and truncation from training; either would silently change prompts.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._folder = folder
        self._config = dict(config or {})
        self._templates: dict[bool, str] = {}
        self.name_or_path = "" if folder is None else str(folder)
        named = named_tokens(self._config, Path(self.name_or_path))
        self.bos_token = bos_token or named.get("bos_token")
        """The beginning-of-sequence token's text, or None."""
        self.eos_token = eos_token or named.get("eos_token")
        """The end-of-sequence token's text, or None."""
        self.pad_token, self.unk_token = named.get("pad_token"), named.get("unk_token")
        self.bos_token_id = self._id_of(self.bos_token, "bos_token")
        self.eos_token_id = self._id_of(self.eos_token, "eos_token")
        first = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*first, *eos_token_ids]))
        """Every token id that ends an output; the tokenizer's own comes first."""
        if self.eos_token_id is None and self.eos_token_ids:
            self.eos_token_id = self.eos_token_ids[0]
        self._added = backend.get_added_tokens_decoder()
        self.special_texts = {token_id: token.content for token_id, token in self._added.items() if token.special}
        """Special tokens by id, which `skip_special_tokens` leaves out of text."""
        self.added_texts = frozenset(token.content for token in self._added.values())
        """The texts of all added tokens, special or not."""
        given = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        self.special_tokens_map = named | {name: token for name, token in given.items() if token is not None}
        """The special tokens with a role, by role name."""
        steps = _decoder_steps(backend)
        self.is_byte_level = "ByteLevel" in steps
        """Whether every token is a sequence of bytes, regardless of the token before it."""
        self.has_byte_fallback = "ByteFallback" in steps
        """Whether tokens <0x00> to <0xFF> are bytes whose runs are decoded as a whole."""
        self._anchor: tuple[list[int], str] | None = None
        self._token_bytes: dict[int, bytes] = {}
        self._token_texts: dict[int, str] = {}
        self._bytes_by_id: dict[int, int | None] = {}

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Load tokenizer.json from a model folder.

        bos and eos come from tokenizer_config.json; further end tokens from generation_config.json, or else from
        config.json. Raises ModelError when tokenizer.json is missing or unreadable, or when one
        of these files names a token that does not exist.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(
                f"{path} is missing. The tokenizer is read from that file; for a model that ships only tokenizer.model "
                "or vocab.json, load its tokenizer once with transformers and save it with save_pretrained()."
            )
        check_regular(path, MAX_TOKENIZER_BYTES)
        try:
            backend = Backend.from_file(str(path))
        # The library raises plain Exception for everything it cannot parse.
        except Exception as error:
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        return cls(backend, eos_token_ids=eos_token_ids(folder), folder=folder, config=config)

    def __repr__(self) -> str:
        return f"Tokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size})"

    def __len__(self) -> int:
        """Number of tokens, added ones included; the model's own vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added ones."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`, or None."""
        return None if self.pad_token is None else self._backend.token_to_id(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`, or None."""
        return None if self.unk_token is None else self._backend.token_to_id(self.unk_token)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, those with a role first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.special_texts.values()]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        ids = [self._backend.token_to_id(token) for token in self.all_special_tokens]
        return [token_id for token_id in ids if token_id is not None]

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        return dict(self._config)

    @property
    def model_max_length(self) -> int:
        """The model's longest input in tokens, according to its tokenizer_config.json."""
        return int(self._config.get("model_max_length") or 10**30)

    @property
    def padding_side(self) -> str:
        """ "right" or "left"."""
        return str(self._config.get("padding_side") or "right")

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template, or None."""
        try:
            return self.own_template(with_tools=False)
        except ConfigError:
            return None

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: None = None,
    ) -> BatchEncoding:
        """Return the token ids of one text, or of each, with their attention masks. Raises ConfigError."""
        if return_tensors is not None:
            raise ConfigError(
                "return_tensors must be None: token ids come as lists.",
                parameter="return_tensors",
                value=return_tensors,
            )
        texts = [text] if isinstance(text, str) else list(text)
        if truncation:
            rows = [self._truncated(each, max_length or self.model_max_length, add_special_tokens) for each in texts]
        else:
            rows = self.encode_batch(texts, add_special_tokens)
        length = self.model_max_length if max_length is None else max_length
        found = padded(rows, padding, length, pad_id=self.pad_token_id, side=self.padding_side)
        return BatchEncoding({key: values[0] for key, values in found.items()}) if isinstance(text, str) else found

    def _truncated(self, text: str, max_length: int, add_special_tokens: bool) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        num_special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(0, max_length - num_special))
        return list(self._backend.post_process(encoding, None, add_special_tokens).ids)

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id, by the token's vocabulary entry."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens."""
        return {token.content: token_id for token_id, token in sorted(self._added.items())}

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of `text` as vocabulary entries."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).tokens)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or of each; unknown tokens become `unk_token_id`."""
        if isinstance(tokens, str):
            token_id = self._backend.token_to_id(tokens)
            return self.unk_token_id if token_id is None else token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> Any:
        """Return a token's vocabulary entry, or those of several; None for an id beyond the vocabulary."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = self.special_texts if skip_special_tokens else ()
        return [self._backend.id_to_token(token_id) for token_id in ids if token_id not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of vocabulary entries."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    @cached_property
    def longest_token(self) -> int:
        """Length of the longest token in characters; a text has at least its own length divided by this in tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> str | list[int] | BatchEncoding:
        """Return a conversation as token ids, in a `BatchEncoding` if `return_dict`, or as text.

        `chat_template` is Jinja text that replaces the model's; `variables` are the template's, and `content_format`
        is that of `render_chat`. Raises ConfigError without a template, RequestError for messages that it refuses.
        """
        from sempre.engine.text.chat_template import render_chat

        if chat_template is None:
            chat_template = self.own_template(with_tools=bool(tools))
        text = render_chat(
            conversation,
            chat_template,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )
        # the template writes the special tokens itself
        if not tokenize:
            return text
        return self(text, add_special_tokens=False) if return_dict else self.encode(text, add_special_tokens=False)

    def own_template(self, *, with_tools: bool) -> str:
        """Return the model's chat template. Raises ConfigError if it has none, ModelError if it is not text."""
        from sempre.engine.text.chat_template import load_chat_template

        if self._folder is None:
            raise ConfigError("chat_template must be given: this tokenizer has none.", parameter="chat_template")
        found = self._templates.get(with_tools)
        if found is None:
            found = self._templates[with_tools] = load_chat_template(self._folder, tools=("tool",) * with_tools)
        return found

    def to_json(self) -> str:
        """Return the tokenizer in the form of tokenizer.json."""
        return str(self._backend.to_str())

    def encode(
        self, text: str, add_special_tokens: bool = True, *, truncation: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Return the token ids of `text`; `add_special_tokens` applies tokenizer.json's post-processor."""
        if truncation:
            return self._truncated(text, max_length or self.model_max_length, add_special_tokens)
        if len(text) > LONG_TEXT:
            # unlike `encode`, this releases the GIL
            return self.encode_batch([text], add_special_tokens)[0]
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Return the token ids of two texts, with the special tokens that the tokenizer puts between and around."""
        return list(self._backend.encode(first, second).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text; equal to `encode` on each, but in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`; invalid UTF-8 becomes U+FFFD, ids beyond the vocabulary are skipped."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return the text of each of `sequences`; unlike `decode`, this releases the GIL."""
        ids = [list(token_ids) for token_ids in sequences]
        return list(self._backend.decode_batch(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Return one token as text, with its leading space; part of a character shows as U+FFFD."""
        cached = self._token_texts.get(token_id)
        if cached is None:
            cached = self._token_texts[token_id] = self.token_bytes(token_id).decode("utf-8", errors="replace")
        return cached

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that the token adds inside a text; b"" beyond the vocabulary.

        A token may hold only part of a character; the joined bytes of all tokens are the text.
        """
        cached = self._token_bytes.get(token_id)
        if cached is None:
            cached = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return cached

    def knows(self, token_id: int) -> bool:
        """Whether a token has this id; a model's vocabulary may be padded beyond the tokenizer's."""
        return bool(self.token_bytes(token_id)) or self._backend.id_to_token(token_id) is not None

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte of a token <0x00> to <0xFF>, None for other tokens."""
        if not self.has_byte_fallback:
            return None
        if token_id not in self._bytes_by_id:
            found = _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "")
            self._bytes_by_id[token_id] = int(found[1], 16) if found else None
        return self._bytes_by_id[token_id]

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:
                return token.encode()  # an added token, written as plain text
        byte = self.byte_of(token_id)
        if byte is not None:
            return bytes([byte])
        # Other decoders treat a text's first token differently (they drop its space), so decode it after another one.
        if self._anchor is None:
            anchor_ids = self.encode("a", add_special_tokens=False)
            self._anchor = (anchor_ids, self.decode(anchor_ids, skip_special_tokens=False))
        anchor_ids, anchor_text = self._anchor
        return self.decode([*anchor_ids, token_id], skip_special_tokens=False).removeprefix(anchor_text).encode()

    def _id_of(self, token: str | None, field: str) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelError(f"{field} {token!r} is not in the tokenizer's vocabulary of {len(self)} tokens.")
        return int(token_id)


def _decoder_steps(backend: Backend) -> set[str]:
    """Return the type of the decoder, or the types of the decoders in a sequence."""
    if backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder])}
