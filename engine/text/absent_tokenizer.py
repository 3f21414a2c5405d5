"""The tokenizer used with skip_tokenizer_init: prompts and outputs are token ids only."""

from __future__ import annotations

from typing import NoReturn

from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError


class AbsentTokenizer(Tokenizer):
    """Has no tokens; everything that needs text raises RequestError."""

    makes_text = False

    def __init__(self) -> None:
        self.bos_token = self.eos_token = None
        self.bos_token_id = self.eos_token_id = None
        self.eos_token_ids = ()
        self._folder = None

    def __repr__(self) -> str:
        return "AbsentTokenizer()"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RequestError(
            "there is no text with `skip_tokenizer_init=True`: give prompts as prompt_token_ids, without text "
            "parameters, and read token_ids.",
            parameter="prompt",
        )
