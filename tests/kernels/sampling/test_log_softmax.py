"""Log-probabilities against float64, their order and ranks, and that a row is the same alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import sampling_reference as reference
import torch

from sempre.kernels.sampling import Logprobs, Reports, candidate_logprobs, logprobs
from sempre.kernels.threads import get_num_threads, set_num_threads


def _logits(rows: int, vocab_size: int, scale: float) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(1)) * scale


def _equal(a: Logprobs, b: Logprobs) -> bool:
    return (
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs.view(np.uint32), b.logprobs.view(np.uint32))
        and np.array_equal(a.ranks, b.ranks)
    )


@pytest.mark.parametrize("vocab_size", [1, 50, 4097, 49_152])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 30.0])
@pytest.mark.parametrize("num_best", [0, 5, -1])
def test_against_float64(vocab_size: int, scale: float, num_best: int) -> None:
    logits = _logits(3, vocab_size, scale)
    targets = np.array([0, vocab_size // 2, vocab_size - 1])
    found = logprobs(logits, np.arange(3), targets, num_best)
    k = vocab_size if num_best < 0 else min(num_best, vocab_size)
    assert found.token_ids.shape == found.logprobs.shape == (3, 1 + k)
    for row, x in enumerate(logits.numpy()):
        exact = reference.log_softmax(x)
        order = np.lexsort((np.arange(vocab_size), -x))
        assert found.token_ids[row].tolist() == [targets[row], *order[:k].tolist()]
        assert found.ranks[row] == 1 + np.flatnonzero(order == targets[row])[0]
        wanted = exact[found.token_ids[row]]
        assert (np.abs(found.logprobs[row] - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()
    assert found.valid.all()


def test_ties_are_ordered_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -torch.inf, 0.0, -0.0, 2.0]])
    found = logprobs(logits, np.zeros(1, np.int64), np.array([6]), 6)
    assert found.token_ids.tolist() == [[6, 1, 2, 6, 0, 4, 5]]
    assert found.ranks.tolist() == [3]


def test_minus_infinity_has_logprob_minus_infinity() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    found = logprobs(logits, np.zeros(1, np.int64), np.array([2]), -1)
    assert found.token_ids.tolist() == [[2, 1, 0, 2]]
    assert found.logprobs.tolist() == [[-np.inf, 0.0, -np.inf, -np.inf]]


@pytest.mark.parametrize("num_best", [0, 3, -1])
def test_a_row_alone_equals_the_row_in_a_batch(num_best: int) -> None:
    logits = _logits(100, 1500, 4.0)
    targets = np.arange(100)
    before = get_num_threads()
    try:
        set_num_threads(1)
        one_thread = logprobs(logits, np.arange(100), targets, num_best)
        set_num_threads(2)
        two_threads = logprobs(logits, np.arange(100), targets, num_best)
        assert _equal(one_thread, two_threads)
        for row in range(0, 100, 7):
            lone = logprobs(logits[row : row + 1].clone(), np.zeros(1, np.int64), targets[row : row + 1], num_best)
            assert _equal(lone, two_threads.part(slice(row, row + 1)))
    finally:
        set_num_threads(before)


def test_rows_are_chosen_by_index() -> None:
    logits = _logits(10, 200, 2.0)
    every = logprobs(logits, np.arange(10), np.zeros(10, np.int64), 4)
    some = logprobs(logits, np.array([7, 2]), np.zeros(2, np.int64), 4)
    assert _equal(some, Logprobs(*(field[[7, 2]] for field in every)))  # type: ignore[arg-type]


def test_logprob_of_a_token_does_not_depend_on_how_many_are_reported() -> None:
    logits = _logits(1, 3000, 3.0)
    row, target = np.zeros(1, np.int64), np.array([17])
    whole = logprobs(logits, row, target, -1)
    few = logprobs(logits, row, target, 5)
    assert np.array_equal(few.logprobs[0].view(np.uint32), whole.logprobs[0, :6].view(np.uint32))


def test_rows_without_a_distribution_are_marked() -> None:
    logits = torch.zeros(4, 100)
    logits[0, 50], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    found = logprobs(logits, np.arange(4), np.zeros(4, np.int64), 2)
    assert found.valid.tolist() == [False, False, False, True]


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 10\), found 10"):
        logprobs(torch.zeros(1, 10), np.zeros(1, np.int64), np.array([10]), 0)


@pytest.mark.parametrize("reports", [Reports(), Reports(logits=True)], ids=["logprobs", "logits"])
def test_candidates_have_the_bits_of_the_whole_vocabulary(reports: Reports) -> None:
    logits = _logits(40, 1500, 4.0)
    logits[3, 7] = -torch.inf
    candidates = np.random.default_rng(1).integers(-1, 1500, (40, 9), np.int32)
    candidates[3, :2] = 7, -1
    found = candidate_logprobs(logits, candidates, reports)
    for row in range(40):
        whole = logprobs(logits, np.array([row]), np.zeros(1, np.int64), -1, reports)
        by_id = dict(zip(whole.token_ids[0, 1:].tolist(), whole.logprobs[0, 1:], strict=True)) | {
            -1: np.float32(-np.inf)
        }
        expected = np.array([by_id[token_id] for token_id in candidates[row].tolist()], np.float32)
        assert np.array_equal(found[row].view(np.uint32), expected.view(np.uint32))
        lone = candidate_logprobs(logits[row : row + 1].clone(), candidates[row : row + 1], reports)
        assert np.array_equal(lone[0].view(np.uint32), found[row].view(np.uint32))
    assert found[3, :2].tolist() == [-np.inf, -np.inf]


def test_candidates_that_do_not_fit_are_refused() -> None:
    for unfit, text in [
        (np.array([[10]], np.int32), r"candidates: expected ids in \[-1, 10\), found 10"),
        (np.array([[-2]], np.int32), r"candidates: expected ids in \[-1, 10\), found -2"),
        (np.array([[1], [1]], np.int32), r"candidates: expected 1 rows of ids, found the shape \[2, 1\]"),
    ]:
        with pytest.raises(ValueError, match=text):
            candidate_logprobs(torch.zeros(1, 10), unfit)
