"""Keys shared by the requests of a decode step, read once: the bits of reading them for each."""

from __future__ import annotations

import pytest
import torch
from shared_prefix_cases import (
    Requests,
    SharedStep,
    check_beside_prompts,
    check_shared_prefixes,
    check_that_keys_are_read_once,
)

from sempre.kernels.attention import HeadLayout, PagedBatch, SharedPrefixes
from sempre.kernels.attention.gpu_tiles import SPLIT

pytestmark = pytest.mark.gpu

TREE: Requests = [
    ("aa", 5), ("ab", 70), ("", 9), ("aa", 0), ("ab", 1), ("c", 1300), ("c", 3), ("aad", 7), ("", 2000), ("aae", 512),
]  # fmt: skip
ARRAYS = ("requests", "tiles", "num_tiles", "counts")
MANY: Requests = [("abcdefgh", 1 + row % 70) for row in range(130)]
# query heads, key heads, head dim: groups of 1 to 16
HEADS = [
    (32, 8, 128),
    (16, 8, 128),
    (8, 8, 128),
    (9, 3, 64),
    (14, 2, 64),
    (8, 1, 80),
    (4, 1, 256),
    (16, 1, 128),
    (8, 1, 512),
]
CASES = [
    *((heads, torch.bfloat16) for heads in HEADS),
    ((14, 2, 64), torch.float32),
    ((16, 8, 128), torch.float16),
    ((4, 2, 512), torch.float32),
]


def _layout(heads: tuple[int, int, int]) -> HeadLayout:
    return HeadLayout(*heads)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(("heads", "dtype"), CASES, ids=str)
def test_groups_within_groups(heads: tuple[int, int, int], dtype: torch.dtype, block: int) -> None:
    check_shared_prefixes(SharedStep(TREE, _layout(heads), dtype, "cuda", SPLIT, block))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_beside_requests_of_several_rows(heads: tuple[int, int, int]) -> None:
    for requests in (TREE, MANY):
        check_beside_prompts(SharedStep(requests, _layout(heads), torch.bfloat16, "cuda", SPLIT))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_one_prefix_of_many(heads: tuple[int, int, int]) -> None:
    check_shared_prefixes(SharedStep(MANY, _layout(heads), torch.bfloat16, "cuda", SPLIT))


@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(1.5, False), (None, True), (2.5, True)])
@pytest.mark.parametrize("heads", [(16, 8, 128), (64, 8, 64), (8, 4, 256)], ids=str)
def test_soft_caps_and_sinks(heads: tuple[int, int, int], soft_cap: float | None, with_sinks: bool) -> None:
    for requests in (TREE, MANY):
        check_shared_prefixes(
            SharedStep(
                requests, _layout(heads), torch.bfloat16, "cuda", SPLIT, soft_cap=soft_cap, with_sinks=with_sinks
            )
        )


def test_keys_are_read_for_the_group() -> None:
    for heads in ((32, 8, 128), (9, 3, 64)):
        step = SharedStep([("ab", 3), ("ab", 40), ("ab", 0)], _layout(heads), torch.bfloat16, "cuda", SPLIT)
        check_that_keys_are_read_once(step)


def test_a_captured_graph_serves_other_groups() -> None:
    """Sizes are fixed at capture; groups, lengths and rows change under it."""
    steps = [
        SharedStep(requests, _layout((32, 8, 128)), torch.bfloat16, "cuda", SPLIT)
        for requests in (TREE, [("aab", 3)] * 9 + [("", 1)], [("", 700), ("z", 3), ("z", 9)] + [("", 4)] * 7)
    ]
    first = steps[0]
    batches = []
    for step in steps:
        step.cache, step.qkv = first.cache, first.qkv
        step.tables = step.tables.where(step.tables < 0, step.tables % first.cache.k.shape[0])
        batches.append(step.batch(step.arrays(), stride=8, slack=4096 - max(step.lens)))
    width = max(batch.block_tables.shape[1] for batch in batches)
    tables = torch.zeros(len(TREE), width, dtype=torch.int32, device="cuda")
    assert batches[0].prefixes is not None
    shared = SharedPrefixes(*(getattr(batches[0].prefixes, name).clone() for name in ARRAYS), max_splits=8)
    captured = PagedBatch(tables, batches[0].query_starts, batches[0].context_lens.clone(), 1, 4096, shared)

    def load(batch: PagedBatch) -> None:
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        captured.context_lens.copy_(batch.context_lens)
        assert batch.prefixes is not None
        for name in ARRAYS:
            getattr(shared, name).copy_(getattr(batch.prefixes, name))

    from sempre.kernels.attention import gpu, gpu_prefix

    workspace = gpu.allocate_attention_workspace(32, 128, 32 * SPLIT, torch.device("cuda"))
    out = torch.zeros(len(TREE), 32 * 128, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        gpu_prefix.paged_attention(first.qkv, first.cache, captured, first.heads, first.scores, out, workspace)

    load(batches[0])
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step, batch in zip(steps, batches, strict=True):
        expected = step.attend(step.batch(None))
        load(batch)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
