"""The kernel for splits of long contexts against the one for all cards: equal bits for all heads and contexts."""

from __future__ import annotations

import pytest
import torch
from nonfinite_cases import DAMAGES, Damage
from paged_sequences import PagedSequences, check_damage

from sempre.kernels.attention import AttentionWorkspace, KvCache, gpu_decode

pytestmark = pytest.mark.gpu

# ends before, at and after a tile and a split, and some splits to merge at a time
LENGTHS = (1, 17, 64, 511, 512, 513, 640, 1024, 1300, 3001, 4095, 4608, 6000)
HEADS = [(32, 8, 128), (9, 3, 64), (28, 4, 128), (8, 1, 80), (4, 2, 96), (16, 1, 128), (6, 6, 64), (12, 1, 32)]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel for splits is for compute capability 9.0")


class Launches:
    """Counts launches of the kernel; with `off` the other one serves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.off = False
        launch, serves = gpu_decode.paged_attention, gpu_decode.serves

        def counted(*args: object) -> None:
            self.count += 1
            launch(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(gpu_decode, "LONG_CONTEXT", 0)
        monkeypatch.setattr(gpu_decode, "paged_attention", counted)
        monkeypatch.setattr(gpu_decode, "serves", lambda *args: not self.off and serves(*args))


def _filled(sequences: PagedSequences) -> KvCache:
    """Keys and values of whole prompts."""
    cache = sequences.empty_cache()
    sequences.step(cache, [(s, 0, n) for s, n in enumerate(sequences.lengths)])
    return cache


def _last_rows(
    sequences: PagedSequences, workspace: AttentionWorkspace, *, padding: int = 0, chunk: int = 1
) -> list[torch.Tensor]:
    """Outputs of a step with the last row of each sequence, the last `chunk` of the first."""
    parts = [(s, max(0, n - (chunk if s == 1 else 1)), n) for s, n in enumerate(sequences.lengths)]
    found = sequences.step(_filled(sequences), parts, workspace=workspace, padding=padding)
    assert not workspace.counters.any()
    assert not workspace.arrived.any()
    return found


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equal_bits(
    heads: tuple[int, int, int], dtype: torch.dtype, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    sequences = PagedSequences(LENGTHS, *heads, dtype, "cuda", block=64, with_sinks=sinks)
    workspace = sequences.workspace()
    for padding, chunk in ((0, 1), (3, 1), (0, 12)):
        launches.off, launches.count = True, 0
        expected = _last_rows(sequences, workspace, padding=padding, chunk=chunk)
        assert not launches.count
        launches.off = False
        found = _last_rows(sequences, workspace, padding=padding, chunk=chunk)
        assert launches.count == 1
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 1, 80)], ids=str)
def test_accuracy_against_float64(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    sequences = PagedSequences((700, 1500), *heads, torch.bfloat16, "cuda", block=64)
    for s, out in enumerate(_last_rows(sequences, sequences.workspace())):
        expected = sequences.expected(s)[-1:]
        assert (out.cpu() - expected).norm() / expected.norm() < 8e-3
    assert launches.count == 1


@pytest.mark.parametrize("lengths", [(33_000,), (20_000, 9_000, 70), tuple(range(400, 1900, 6))], ids=len)
def test_long_contexts_and_many_requests(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    sequences = PagedSequences(lengths, 8, 2, 128, torch.bfloat16, "cuda", block=64)
    # many requests need a workspace for longer contexts than theirs
    workspace = PagedSequences((40_000,), 8, 2, 128, torch.bfloat16, "cuda", block=64).workspace()
    launches.off = True
    expected = _last_rows(sequences, workspace)
    launches.off = False
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(expected, _last_rows(sequences, workspace), strict=True))
    assert launches.count == 5


def test_a_step_without_single_rows_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    sequences = PagedSequences((1300, 700), 8, 2, 128, torch.bfloat16, "cuda", block=64)
    parts = [(s, 0, n) for s, n in enumerate(sequences.lengths)]
    expected = sequences.step(sequences.empty_cache(), parts)
    workspace = sequences.workspace()
    found = sequences.step(sequences.empty_cache(), parts, workspace=workspace)
    assert launches.count == 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not workspace.counters.any()
    assert not workspace.arrived.any()


def test_control_a_missing_split_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is able to fail: a context that is shorter by one split has other bits."""
    launches = Launches(monkeypatch)
    sequences = PagedSequences((1100,), 8, 2, 128, torch.bfloat16, "cuda", block=64)
    workspace = sequences.workspace()
    cache = _filled(sequences)
    (long,) = sequences.step(cache, [(0, 1099, 1100)], workspace=workspace)
    (short,) = sequences.step(cache, [(0, 587, 588)], workspace=workspace)
    assert launches.count == 2
    assert not torch.equal(long, short)


@pytest.mark.parametrize("position", [0, 63, 511, 512, 1299])
@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.dtype != torch.float32], ids=str)
def test_rows_that_see_no_damage_keep_their_bits(
    damage: Damage, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    sequences = PagedSequences((1300, 900), 16, 8, 128, damage.dtype, "cuda", block=64)
    check_damage(sequences, damage, [position], [(0, 1299, 1300), (1, 899, 900)])
    assert launches.count
