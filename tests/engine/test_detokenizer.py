"""Deltas join to the decoded text; stop strings end an output at one place, however tokens are grouped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_fallback_backend
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from sempre.engine.text.detokenizer import IncrementalDetokenizer, TextUpdate
from sempre.engine.text.token_stream import finished_text
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
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(len(tokenizer)))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


@given(data=st.data(), skip=st.booleans())
def test_joined_deltas_are_the_decoded_text(byte_level: Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Any ids: half characters, bytes that are no UTF-8, special and added tokens, ids beyond the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, len(byte_level) + 2), max_size=40))
    detokenizer = IncrementalDetokenizer(byte_level, skip_special_tokens=skip)
    text, num_tokens, _ = feed(detokenizer, grouped(data, ids))
    assert text == byte_level.decode(ids, skip_special_tokens=skip)
    assert num_tokens == len(ids)


@given(data=st.data(), stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_stop_string_that_never_comes_changes_nothing(
    byte_level: Tokenizer, data: st.DataObject, stop: list[str]
) -> None:
    """The stop strings begin like the text does, so that text is held back and released all the time."""
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


FOX = 260  # "▁fox" of the tokenizer with byte fallback


def fallback(*, strips: bool) -> Tokenizer:
    backend = byte_fallback_backend()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return Tokenizer(backend)


def words(decoder: decoders.Decoder | None) -> Tokenizer:
    tokens = ["[UNK]", "[CLS]", "a", "##a", "▁", "▁▁", "▁fox", "fox", "##s", ".", "n't", "do", "é", "<0x41>", "a</w>"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["[CLS]"])
    backend.add_tokens([AddedToken(" <x> ", special=False)])
    return Tokenizer(backend)


DECODERS = {
    "fallback": fallback(strips=True),
    "fallback that keeps spaces": fallback(strips=False),
    "word pieces": words(decoders.WordPiece()),
    "word pieces as they are": words(decoders.WordPiece(cleanup=False)),
    "first space": words(decoders.Metaspace()),
    "every space": words(decoders.Metaspace(prepend_scheme="never")),
    "none": words(None),
}


def any_ids(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Mostly bytes where there are any, in runs that are often whole characters."""
    ids = st.integers(0, len(tokenizer) + 2).map(lambda token_id: [token_id])
    if tokenizer.has_byte_fallback:
        characters = st.sampled_from(["\n", " ", "é", "語", "😀"]).map(
            lambda text: [3 + byte for byte in text.encode()]
        )
        ids = characters | ids | st.sampled_from([[3 + 0xE8], [3 + 0xFF], [1]])
    return [token_id for part in data.draw(st.lists(ids, max_size=10)) for token_id in part]


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60)
@given(data=st.data(), skip=st.booleans(), num_bos=st.integers(0, 1))
def test_joined_deltas_are_what_any_decoder_makes_of_the_whole(
    name: str, data: st.DataObject, skip: bool, num_bos: int
) -> None:
    """Without a prompt, and after BOS alone: runs of bytes, right and wrong, spaces that a first token loses."""
    tokenizer = DECODERS[name]
    ids = any_ids(tokenizer, data)
    prompt = [1] * num_bos
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt)
    text, _, _ = feed(detokenizer, grouped(data, ids))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert before + text == tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60)
@given(data=st.data(), skip=st.booleans())
def test_an_output_continues_its_prompt(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = DECODERS[name]
    fox = next(i for i in range(len(tokenizer)) if tokenizer.token_text(i).endswith("fox"))
    prompt, ids = [*any_ids(tokenizer, data), fox], any_ids(tokenizer, data)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt)
    text, _, _ = feed(detokenizer, grouped(data, ids))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert before + text == tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["bytes", "fallback", "fallback that keeps spaces"])
@given(data=st.data())
def test_a_prompt_and_its_output_are_one_text_wherever_it_is_cut(
    byte_level: Tokenizer, name: str, data: st.DataObject
) -> None:
    tokenizer = DECODERS.get(name, byte_level)
    spelt = spell(tokenizer, data.draw(st.text(alphabet="a\né語😀 ", min_size=1, max_size=8)))
    cut = data.draw(st.integers(0, len(spelt)))
    prompt, ids = spelt[:cut], spelt[cut:]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    text, _, _ = feed(detokenizer, grouped(data, ids))
    assert finished_text(tokenizer, prompt) + text == tokenizer.decode(spelt)


def test_a_run_of_bytes_comes_out_when_nothing_can_change_it(byte_fallback: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback)
    assert detokenizer.update([3 + 0x0A]).delta == ""  # a wrong byte after it would make it U+FFFD
    assert detokenizer.update([FOX]).delta == "\n fox"
    assert detokenizer.update([3 + 0x0A, 3 + 0xFF]).delta == "\ufffd\ufffd"
    assert detokenizer.update([3 + 0x0A]).delta == "\ufffd"
    assert detokenizer.update([FOX]).delta == " fox"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_of_bytes_ends_the_output_at_its_last_byte(byte_fallback: Tokenizer, include: bool) -> None:
    ids = [FOX, *(3 + byte for byte in "\né".encode())]
    detokenizer = IncrementalDetokenizer(byte_fallback, stop=["\né", "\n\n"], include_stop_str_in_output=include)
    updates = [detokenizer.update([token_id]) for token_id in ids]
    assert "".join(update.delta for update in updates) == ("fox\né" if include else "fox")
    assert [update.stop_reason for update in updates] == [*[None] * (len(ids) - 1), "\né"]


def test_a_stop_string_that_a_wrong_byte_undoes_does_not_count(byte_fallback: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback, stop=["x\n fox"])
    text, num_tokens, stop = feed(detokenizer, [[FOX], [3 + 0x0A], [3 + 0xFF], [FOX]])
    assert (text, stop) == ("fox\ufffd\ufffd fox", None)
    assert num_tokens == 4


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
    assert detokenizer.text == byte_level.decode(ids, skip_special_tokens=True)


def test_updates_after_the_end_are_a_bug(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level)
    detokenizer.update([5], finished=True)
    with pytest.raises(AssertionError):
        detokenizer.update([5])


SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|日本|>"]
SPECIAL_STOPS = st.text(alphabet="ab", max_size=2).flatmap(
    lambda before: st.sampled_from(SPECIAL).flatmap(
        lambda special: st.text(alphabet="ab", max_size=2).map(lambda behind: before + special + behind)
    )
)


def reference_with_special(
    tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str], skip: bool
) -> tuple[int, int, str] | None:
    """Return (tokens used, characters before the match in the text with all tokens, stop string), by every prefix."""
    everything = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
    for num_tokens in range(1, len(ids) + 1):
        texts = everything[:num_tokens]
        shown = [text for text in texts if not (skip and text in SPECIAL)]
        whole, visible = "".join(texts), "".join(shown)
        ending = []
        for rank, stop_string in enumerate(stop):
            with_special = any(special in stop_string for special in SPECIAL)
            if (whole if with_special else visible).endswith(stop_string) and not (
                skip and not with_special and texts[-1] in SPECIAL
            ):
                size, characters = 0, len(stop_string)
                for text in reversed(texts):  # a stop string of visible text spans what is hidden in it
                    characters -= 0 if skip and not with_special and text in SPECIAL else len(text)
                    size += len(text)
                    if characters <= 0:
                        break
                ending.append((len(whole) - size - min(characters, 0), rank))
        if ending:
            start, rank = min(ending)
            return num_tokens, start, stop[rank]
    return None


@given(
    data=st.data(),
    tokens=st.lists(st.sampled_from(["a", "b", *SPECIAL]), max_size=14),
    stop=st.lists(SPECIAL_STOPS | st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=3),
    skip=st.booleans(),
    include=st.booleans(),
)
def test_stop_strings_with_special_tokens_match_hidden_or_not(
    byte_level: Tokenizer, data: st.DataObject, tokens: list[str], stop: list[str], skip: bool, include: bool
) -> None:
    ids = [token_id for token in tokens for token_id in byte_level.encode(token)]
    detokenizer = IncrementalDetokenizer(
        byte_level, skip_special_tokens=skip, stop=stop, include_stop_str_in_output=include
    )
    found = feed(detokenizer, grouped(data, ids))
    expected = reference_with_special(byte_level, ids, stop, skip)
    if expected is None:
        assert found == (byte_level.decode(ids, skip_special_tokens=skip), len(ids), None)
        return
    num_tokens, start, stop_string = expected
    before = "".join(tokens)[:start]
    for special in SPECIAL if skip else ():
        before = before.replace(special, "")
    assert found == (before + stop_string if include else before, num_tokens, stop_string)


def test_a_hidden_special_token_is_a_stop_string_and_what_only_looks_like_one_is_not(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("fox<|im_end|>a")
    end = len(byte_level.encode("fox")) + 1
    assert feed(IncrementalDetokenizer(byte_level, stop=["<|im_end|>"]), [ids]) == ("fox", end, "<|im_end|>")
    included = IncrementalDetokenizer(byte_level, stop=["<|im_end|>"], include_stop_str_in_output=True)
    assert feed(included, [[token_id] for token_id in ids]) == ("fox<|im_end|>", end, "<|im_end|>")
    # its text is not part of the output, so a word inside it is not, either
    assert feed(IncrementalDetokenizer(byte_level, stop=["im_end", "xa"]), [ids]) == ("fo", len(ids), "xa")
