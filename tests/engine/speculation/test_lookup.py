"""Lookup of earlier places like the present one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sempre.engine.speculation.lookup import NgramDrafter, RecentOutputs, SaltedOutputs, SuffixDrafter, TokenIndex

tokens = st.lists(st.integers(0, 3), max_size=40)


def test_the_longest_match_wins_and_the_last_of_equals() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3])
    assert drafter.propose(2) == [50, 9]  # three tokens match there, two at the later place
    drafter = NgramDrafter(2, 5)
    drafter.extend([2, 3, 50, 8, 2, 3, 60, 7, 2, 3])
    assert drafter.propose(3) == [60, 7, 2]


def test_a_loop_goes_on_turning() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([4, 5, 6, 4, 5, 6, 4, 5])
    assert drafter.propose(7) == [6, 4, 5, 6, 4, 5, 6]


def test_nothing_alike_gives_no_draft() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([1, 2, 3, 4])
    assert drafter.propose(4) == []
    drafter.extend([])
    assert NgramDrafter(2, 5).propose(4) == []


@given(tokens, st.integers(1, 3))
def test_the_places_are_all_places(sequence: list[int], width: int) -> None:
    index = TokenIndex(width)
    for at in range(0, len(sequence), 3):
        index.extend(sequence[at : at + 3])
    pattern = sequence[-width:]
    ends = [end for end in range(width, len(sequence)) if sequence[end - width : end] == pattern]
    assert index.places(sequence) == (ends[::-1][:16] if len(sequence) >= width else [])


@given(tokens, st.integers(1, 5), st.integers(1, 7))
def test_a_draft_follows_a_longest_match(sequence: list[int], longest: int, count: int) -> None:
    drafter = NgramDrafter(1, longest)
    drafter.extend(sequence)
    drafts = drafter.propose(count)

    def length(end: int) -> int:
        most = min(longest, end)
        return next((n for n in range(most) if sequence[end - 1 - n] != sequence[-1 - n]), most)

    ends = range(1, len(sequence))
    # the index looks at the last places only, which hold every end of so short a sequence that can matter
    best = max((min(longest, length(end)) for end in ends if length(end)), default=0)
    if not best:
        assert drafts == []
    else:
        assert len(drafts) <= count
        starts = [end for end in ends if length(end) == best]
        assert drafts[0] in {sequence[end] for end in starts} or len(starts) > 16


def test_suffix_lookup_takes_what_most_places_go_on_with() -> None:
    recent = RecentOutputs(2)
    for output in ([7, 8, 1, 2], [7, 8, 1, 3], [7, 8, 5, 5]):
        recent.add(output)
    drafter = SuffixDrafter(recent, 2, 24)
    drafter.extend([7, 8])
    assert drafter.propose(1) == [1]
    assert drafter.propose(4)[0] == 1


def test_suffix_lookup_does_not_draft_where_every_place_goes_on_differently() -> None:
    recent = RecentOutputs(2)
    for last in (1, 2, 3):
        recent.add([7, 8, last])
    drafter = SuffixDrafter(recent, 2, 24)
    drafter.extend([7, 8])
    assert drafter.propose(1) == [3]
    recent.add([7, 8, 4])
    assert drafter.propose(1) == []


def test_an_output_that_ends_is_found_by_the_next_request_and_never_read_past() -> None:
    recent = RecentOutputs(2)
    first = SuffixDrafter(recent, 2, 24)
    first.extend([1, 1, 1, 30, 31, 32])
    first.finish(3)
    second = SuffixDrafter(recent, 2, 24)
    second.extend([9, 30, 31])
    assert second.propose(5) == [32]
    second.finish(0)
    third = SuffixDrafter(recent, 2, 24)
    third.extend([9, 31, 32])
    assert third.propose(5) == []


def test_recent_outputs_are_bounded() -> None:
    recent = RecentOutputs(2, capacity=100)
    for number in range(200):
        recent.add([number] * 9)
    assert len(recent.index.token_ids) <= 200
    assert recent.index.places([199, 199])
    assert not recent.index.places([3, 3])


def test_no_draft_comes_from_an_output_with_another_salt() -> None:
    outputs = SaltedOutputs(2)

    def drafts(salt: str | None) -> list[int]:
        drafter = SuffixDrafter(outputs.of(salt), 2, 24)
        drafter.extend([9, 30, 31])
        return drafter.propose(5)

    first = SuffixDrafter(outputs.of("a"), 2, 24)
    first.extend([1, 30, 31, 32])
    first.finish(1)
    assert drafts("a") == [32]
    assert drafts("b") == drafts(None) == drafts("") == []


def test_salts_are_bounded_and_those_in_use_stay() -> None:
    outputs = SaltedOutputs(2, capacity=1000)
    outputs.of("kept").add([7, 8, 9])
    for number in range(500):
        outputs.of(str(number)).add([number] * 40)
        assert outputs.of("kept").index.places([7, 8])
    total = sum(len(recent.index.token_ids) for recent in outputs._by_salt.values())
    assert total <= 3000
    assert outputs.of("499").index.places([499, 499])
    assert not outputs.of("3").index.places([3, 3])
