"""Hypothesis settings, and small tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from small_tokenizers import byte_fallback_backend, byte_level_backend

from sempre.engine.text.tokenizer import Tokenizer

# The same examples in every run, and no deadline: a busy machine is no failure.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), bos_token="<s>", eos_token="</s>")
