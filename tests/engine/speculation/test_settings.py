"""What users may ask for, in Python and on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.arguments import engine_config
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import ConfigError


@pytest.mark.parametrize(
    ("keywords", "method", "tokens"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "ngram", 3),
        ({"speculative_config": {"method": "suffix"}}, "suffix", 4),
        ({"speculative_config": {"model": "tiny-draft"}}, "draft_model", 4),
        ({"speculative_config": SpeculativeConfig(method="ngram")}, "ngram", 4),
        ({"spec_method": "ngram", "spec_tokens": 2}, "ngram", 2),
        ({"spec_model": "tiny-draft", "spec_tokens": 5}, "draft_model", 5),
        ({"speculative_config": {"method": "ngram"}, "spec_tokens": 6}, "ngram", 6),
    ],
)
def test_settings_that_turn_it_on(keywords: dict[str, Any], method: str, tokens: int) -> None:
    config = engine_config("tiny", **keywords).speculative_config
    assert config is not None
    assert (config.method, config.num_speculative_tokens) == (method, tokens)
    assert (config.model_path is not None) == (method == "draft_model")


@pytest.mark.parametrize(
    "keywords",
    [{}, {"speculative_config": None}, {"spec_method": None}, {"speculative_config": {"num_speculative_tokens": 0}}],
)
def test_settings_that_leave_it_off(keywords: dict[str, Any]) -> None:
    assert engine_config("tiny", **keywords).speculative_config is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram", "speculative_config='ngram' must be a mapping"),
        (
            {"method": "eagle"},
            r"speculative_config\['method'\] must be 'ngram' or 'suffix' or .*, got 'eagle'",
        ),
        (
            {"num_speculative_tokens": "4", "method": "ngram"},
            r"speculative_config\['num_speculative_tokens'\] must be an int, got '4'",
        ),
        ({"method": ["ngram"]}, r"method'\] must be 'ngram' or .*, got \['ngram'\]"),
        (
            {"method": "ngram", "model": "tiny-draft"},
            r"speculative_config\['model'\].*must be left out for method 'ngram'",
        ),
        ({"method": "draft_model"}, r"speculative_config\['model'\]=None must name the draft model"),
        ({"method": "ngram", "num_speculative_tokens": 99}, r"num_speculative_tokens'\] must be at most 32, got 99"),
        ({"method": "ngram", "num_spekulative_tokens": 2}, "Did you mean 'num_speculative_tokens'"),
        ({"method": "ngram", "placement": "worker"}, r"placement'\]='worker' must be left out"),
        ({"method": "ngram", "prompt_lookup_min": 6}, r"prompt_lookup_min'\]=6 must be in \[1, prompt_lookup_max=5\]"),
        ({"method": "ngram", "model_path": "/x"}, "model_path.*is not a setting"),
    ],
)
def test_settings_that_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        engine_config("tiny", speculative_config=value)
    assert caught.value.parameter == "speculative_config"


def test_a_number_of_drafts_alone_asks_for_a_method() -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens=3 needs a method: ngram, suffix, draft_model"):
        engine_config("tiny", spec_tokens=3)


def test_two_ways_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="spec_tokens=3 says otherwise"):
        engine_config("tiny", speculative_config={"method": "ngram", "num_speculative_tokens": 2}, spec_tokens=3)
