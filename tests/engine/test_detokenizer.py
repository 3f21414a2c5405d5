"""Deltas join to the decoded text; stop strings end an output at one place, however tokens are grouped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempre.engine.text.detokenizer import IncrementalDetokenizer, TextUpdate
from sempre.engine.text.tokenizer import Tokenizer


def feed(detokenizer: IncrementalDetokenizer, groups: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
    """Give the groups in turn and finish; return the joined deltas, the number of tokens used, and the stop reason."""
    text, num_tokens = "", 0
    for group in groups:
        update = detokenizer.update(group)
        text += update.delta
        num_tokens += update.num_tokens
        if update.stop_reason is not None:
            assert detokenizer.text == text
            return text, num_tokens, update.stop_reason
    text += detokenizer.update([], finished=True).delta
    assert detokenizer.text == text
    return text, num_tokens, None


def grouped(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    return [ids[start:end] for start, end in pairwise(cuts)]


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ids of single-byte tokens, so that stop strings span many tokens."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


@given(data=st.data(), skip=st.booleans())
def test_joined_deltas_are_the_decoded_text(byte_level: Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Any ids: half characters, bytes that are no UTF-8, special and added tokens, ids beyond the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 2), max_size=40))
    detokenizer = IncrementalDetokenizer(byte_level, skip_special_tokens=skip)
    text, num_tokens, _ = feed(detokenizer, grouped(data, ids))
    assert text == byte_level.decode(ids, skip_special_tokens=skip)
    assert num_tokens == len(ids)


@given(data=st.data(), stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_stop_string_that_never_comes_changes_nothing(
    byte_level: Tokenizer, data: st.DataObject, stop: list[str]
) -> None:
    """The stop strings begin like the text does, so that text is held back and let go all the time."""
    text = data.draw(st.text(alphabet="abc", max_size=30))
    absent = [stop_string + "~" for stop_string in stop]
    ids = spell(byte_level, text)
    detokenizer = IncrementalDetokenizer(byte_level, stop=absent)
    assert feed(detokenizer, grouped(data, ids)) == (text, len(ids), None)


@given(text=st.text(max_size=12))
def test_no_delta_holds_a_half_character(byte_level: Tokenizer, text: str) -> None:
    detokenizer = IncrementalDetokenizer(byte_level)
    shown = ""
    for token_id in spell(byte_level, text):
        shown += detokenizer.update([token_id]).delta
        assert text.startswith(shown)
    assert shown == text  # nothing is held back longer than its last byte takes


@given(data=st.data())
def test_byte_fallback_tokens_join_to_characters(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    """A decoder that drops a text's first space: behind a prompt the space is kept."""
    ids = data.draw(st.lists(st.integers(259, byte_fallback.vocab_size - 1), max_size=12))
    ids += byte_fallback.encode(data.draw(st.text(max_size=8)), add_special_tokens=False)
    ids = [token_id for token_id in ids if token_id not in byte_fallback.all_special_ids]
    prompt = byte_fallback.encode("a", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(byte_fallback, prompt_token_ids=prompt)
    text, _, _ = feed(detokenizer, grouped(data, ids))
    assert "a" + text == byte_fallback.decode([*prompt, *ids])


def test_byte_fallback_newline_comes_out_at_once_and_bad_bytes_harm_nothing(byte_fallback: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback)
    assert detokenizer.update([3 + 0x0A]).delta == "\n"
    assert detokenizer.update([3 + 0xE2]).delta == ""
    assert detokenizer.update(byte_fallback.encode("fox", add_special_tokens=False)).delta == "\ufffd fox"


def test_a_character_the_prompt_left_unfinished_is_completed(byte_level: Tokenizer) -> None:
    for character in ("é", "語", "😀"):
        ids = spell(byte_level, "ab" + character)
        for cut in range(2, len(ids)):
            prompt = [*ids[:cut], byte_level.bos_token_id or 0]  # a skipped token adds no bytes
            detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=prompt)
            assert feed(detokenizer, [ids[cut:]])[0] == character


def reference(text: str, stop: list[str], min_tokens: int) -> tuple[int, int, str] | None:
    """One character a token: return (tokens used, start, stop string) of the first match, by trying every prefix."""
    for num_tokens in range(min_tokens + 1, len(text) + 1):
        ending = [
            (num_tokens - len(stop_string), rank)
            for rank, stop_string in enumerate(stop)
            if text[:num_tokens].endswith(stop_string)
        ]
        if ending:
            start, rank = min(ending)
            return num_tokens, start, stop[rank]
    return None


@given(
    data=st.data(),
    text=st.text(alphabet="ab", max_size=24),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
)
def test_stop_strings_end_the_output_at_the_reference_place(
    byte_level: Tokenizer, data: st.DataObject, text: str, stop: list[str], include: bool, min_tokens: int
) -> None:
    detokenizer = IncrementalDetokenizer(
        byte_level, stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens
    )
    found = feed(detokenizer, grouped(data, spell(byte_level, text)))
    expected = reference(text, stop, min_tokens)
    if expected is None:
        assert found == (text, len(text), None)
    else:
        num_tokens, start, stop_string = expected
        end = start + len(stop_string) if include else start
        assert found == (text[:end], num_tokens, stop_string)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["STOP"])
    deltas = [detokenizer.update([token_id]).delta for token_id in spell(byte_level, "aSTSTOaST")]
    assert deltas == ["a", "", "", "ST", "", "", "STOa", "", ""]
    assert detokenizer.update([], finished=True).delta == "ST"


def test_with_the_stop_string_included_nothing_is_held_back(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["STOP"], include_stop_str_in_output=True)
    deltas = [detokenizer.update([token_id]).delta for token_id in spell(byte_level, "aSTO")]
    assert deltas == ["a", "S", "T", "O"]
    assert detokenizer.update(spell(byte_level, "Pxyz")) == TextUpdate("P", 1, "STOP")
    assert detokenizer.text == "aSTOP"


def test_of_several_stop_strings_in_one_token_the_earliest_wins(byte_level: Tokenizer) -> None:
    token = byte_level.encode("<tool_call>")
    assert len(token) == 1
    for stop in (["call", "tool"], ["tool", "call"]):
        update = IncrementalDetokenizer(byte_level, stop=stop).update(token)
        assert update == TextUpdate("<", 1, "tool")
    update = IncrementalDetokenizer(byte_level, stop=["tool_c", "tool"]).update(token)
    assert update.stop_reason == "tool_c"  # one start: the first of the list
    update = IncrementalDetokenizer(byte_level, stop=["tool"], include_stop_str_in_output=True).update(token)
    assert update.delta == "<tool"


def test_a_stop_token_is_left_out_unless_included(byte_level: Tokenizer) -> None:
    ids = spell(byte_level, "fox!")
    plain = IncrementalDetokenizer(byte_level)
    assert plain.update(ids, stop_token=True) == TextUpdate("fox", 4, None)
    included = IncrementalDetokenizer(byte_level, include_stop_str_in_output=True)
    assert included.update(ids, stop_token=True) == TextUpdate("fox!", 4, None)
    eos = byte_level.eos_token_id or 0
    shown = IncrementalDetokenizer(byte_level, skip_special_tokens=False)
    assert shown.update([*ids, eos], stop_token=True).delta == "fox!"


def test_a_stop_string_before_the_stop_token_wins(byte_level: Tokenizer) -> None:
    ids = [*spell(byte_level, "fox END"), byte_level.eos_token_id or 0]
    update = IncrementalDetokenizer(byte_level, stop=[" END"]).update(ids, stop_token=True)
    assert update == TextUpdate("fox", 7, " END")


def test_an_unfinished_character_at_the_end_is_shown_as_decode_shows_it(byte_level: Tokenizer) -> None:
    ids = spell(byte_level, "a😀")[:-1]
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.update(ids).delta == "a"
    assert detokenizer.update([], finished=True).delta == "\ufffd"
    assert detokenizer.text == byte_level.decode(ids)


def test_updates_behind_the_end_are_a_bug(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level)
    detokenizer.update([5], finished=True)
    with pytest.raises(AssertionError):
        detokenizer.update([5])
