"""The kernel for long prompts against the one for all cards: equal bits for all heads, windows, chunks and contexts."""

from __future__ import annotations

import pytest
import torch
from nonfinite_cases import DAMAGES, Damage
from paged_sequences import PagedSequences, check_damage

from sempre.kernels.attention import gpu_prefill

pytestmark = pytest.mark.gpu

# ends before, at and after a tile and a split; a row of its own
LENGTHS = (1, 17, 64, 150, 511, 512, 515, 1300, 2048, 3001)
HEADS = [(32, 8, 128), (9, 3, 64), (28, 4, 128), (8, 1, 80), (4, 2, 96), (16, 1, 128), (6, 6, 64), (64, 1, 64)]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel for long prompts is for compute capability 9.0")


def _steps(sequences: PagedSequences, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Outputs of the whole prompts, and of the first chunks of each size."""
    workspace = sequences.workspace()
    found = sequences.step(
        sequences.empty_cache(), [(s, 0, n) for s, n in enumerate(sequences.lengths)], workspace=workspace
    )
    for size in sizes:
        cache = sequences.empty_cache()
        for start in range(0, min(3 * size, max(sequences.lengths)), size):
            parts = [(s, start, min(n, start + size)) for s, n in enumerate(sequences.lengths) if n > start]
            found += sequences.step(cache, parts, workspace=workspace, padding=start % 3)
    assert not workspace.counters.any()
    return found


class Launches:
    """Counts launches of the kernel; with `off` the other one serves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.off = False
        launch, serves = gpu_prefill.paged_attention, gpu_prefill.serves

        def counted(*args: object) -> None:
            self.count += 1
            launch(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(gpu_prefill, "LONG_CONTEXT", 0)
        monkeypatch.setattr(gpu_prefill, "paged_attention", counted)
        monkeypatch.setattr(gpu_prefill, "serves", lambda *args: not self.off and serves(*args))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 100, 1000])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equal_bits(
    heads: tuple[int, int, int], window: int | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    for dtype in (torch.bfloat16, torch.float16) if not (window or sinks) else (torch.bfloat16,):
        sequences = PagedSequences(LENGTHS, *heads, dtype, "cuda", block=64, window=window, with_sinks=sinks)
        launches.off, launches.count = True, 0
        expected = _steps(sequences, (37, 128, 700))
        assert not launches.count
        launches.off = False
        found = _steps(sequences, (37, 128, 700))
        assert launches.count
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_long_contexts_and_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    for lengths in ((20_000, 9_000), tuple(range(2, 400, 3))):
        sequences = PagedSequences(lengths, 8, 2, 128, torch.bfloat16, "cuda", block=64)
        launches.off = True
        expected = _steps(sequences, (8192,))
        launches.off = False
        assert all(torch.equal(a, b) for a, b in zip(expected, _steps(sequences, (8192,)), strict=True))
    assert launches.count


@pytest.mark.parametrize("position", [0, 63, 64, 511, 512, 1290])
@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.dtype != torch.float32], ids=str)
def test_rows_that_see_no_damage_keep_their_bits(
    damage: Damage, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Launches(monkeypatch)
    sequences = PagedSequences((1300, 300), 16, 8, 128, damage.dtype, "cuda", block=64)
    check_damage(sequences, damage, [position], [(0, max(0, position - 90), min(1300, position + 90)), (1, 299, 300)])
