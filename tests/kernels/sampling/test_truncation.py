"""min-p, top-k and top-p against a full sort in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import sampling_reference as reference

from sempre.kernels.sampling.truncation import truncate_rows

Float32Array = npt.NDArray[np.float32]


def _kept(x: Float32Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> npt.NDArray[np.bool_]:
    row = x.copy()[None]
    truncate_rows(
        row,
        np.zeros(1, np.int64),
        np.ones(1, np.float32),
        np.array([top_k]),
        np.array([top_p]),
        np.array([min_p], np.float32),
    )
    keep: npt.NDArray[np.bool_] = row[0] > -np.inf
    assert np.array_equal(row[0][keep], x[keep])
    return keep


def _logits(kind: str) -> Float32Array:
    generator = np.random.default_rng(0)
    x = generator.standard_normal(5000).astype(np.float32)
    if kind == "peaked":
        return x * np.float32(8)
    if kind == "flat":
        return x * np.float32(0.01)
    if kind == "ties":
        return x.round(1) + np.float32(0)
    if kind == "masked":
        x[generator.random(x.size) < 0.99] = -np.inf
    return x


SETTINGS: list[dict[str, float]] = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": 4999},
    {"top_k": 5000},
    {"top_k": 10**9},
    {"top_p": 1e-12},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 300, "min_p": 0.3},
    {"top_p": 0.6, "min_p": 0.01},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "ties", "masked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_a_full_sort(kind: str, settings: dict[str, float]) -> None:
    x = _logits(kind)
    keep = _kept(x, **settings)  # type: ignore[arg-type]
    assert np.array_equal(keep, reference.truncated(x, **settings))  # type: ignore[arg-type]
    assert keep.any()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 100}, 100),
        ({"top_p": 1e-300}, 1),
        ({"top_p": 0.5}, 500),
        ({"top_p": 0.501}, 501),
        ({"min_p": 1.0}, 1000),
        ({"top_k": 100, "top_p": 0.5}, 50),
    ],
)
def test_all_equal_logits_keep_the_lowest_ids(settings: dict[str, float], kept: int) -> None:
    keep = _kept(np.full(1000, -3.25, np.float32), **settings)  # type: ignore[arg-type]
    assert np.array_equal(np.flatnonzero(keep), np.arange(kept))


def test_top_p_is_reached_and_never_just_missed() -> None:
    """A prefix that lacks less than the smallest unit of probability is not enough."""
    third = 2.0**40  # the integer weight of each of three equal tokens
    for missing, kept in ((-0.5, 1), (0.0, 1), (0.5, 2)):
        top_p = (third + missing) / (3 * third)
        assert top_p * (3 * third) == third + missing, "the product is exact, or this test says nothing"
        assert _kept(np.zeros(3, np.float32), top_p=top_p).sum() == kept


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 0.999999])
def test_the_order_of_the_vocabulary_does_not_matter(top_p: float) -> None:
    """Probabilities are added exactly: the same tokens are kept wherever they are."""
    x = _logits("flat")
    kept = _kept(x, top_p=top_p)
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(x.size)
        moved = _kept(x[order], top_p=top_p)
        assert moved.sum() == kept.sum()
        assert np.array_equal(np.sort(x[order][moved]), np.sort(x[kept]))


def test_both_zeros_are_one_value() -> None:
    x = np.array([-0.0, 0.0, -0.0, 0.0, -1.0], np.float32)
    assert np.flatnonzero(_kept(x, top_k=3)).tolist() == [0, 1, 2]


def test_extreme_values() -> None:
    largest = np.finfo(np.float32).max
    x = np.array([-largest, 1e-45, largest, -1e-45, 0.0, -np.inf], np.float32)
    assert np.flatnonzero(_kept(x, top_k=3)).tolist() == [1, 2, 4]
    assert np.flatnonzero(_kept(x, top_p=0.999)).tolist() == [2]


def test_temperature_divides_first() -> None:
    x = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    arguments = (np.zeros(1, np.int64), np.array([0.5], np.float32), np.zeros(1, np.int64))
    row = x.copy()[None]
    truncate_rows(row, *arguments, np.array([0.75]), np.zeros(1, np.float32))
    # squared and normalised: 0.658, 0.237, 0.105
    assert np.array_equal(row[0], np.array([x[0] / np.float32(0.5), x[1] / np.float32(0.5), -np.inf], np.float32))
