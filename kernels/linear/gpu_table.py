"""Which kernel computes a matmul on a GPU: a fixed table per architecture, read from the top, never tuned at run time.

Every choice gives the same bits (the self-test checks it), so a row only states what was fastest when measured by
`benchmarks/gpu_linear.py`. T rows of x, N out features, K in features.

On sm_90 only tiles of 4 or 8 warps with at least 64 out features and 16 rows agree bit for bit where weights are fp8,
whether or not the activations are too: a smaller tile uses other instructions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.linear.weights import GpuLinearWeight


class Tile(NamedTuple):
    """A Triton program owns `block_t` rows x `block_n` out features and walks K in steps of `block_k`."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"triton-t{self.block_t}-n{self.block_n}-k{self.block_k}-w{self.num_warps}-s{self.num_stages}"


class Library(NamedTuple):
    """The vendor's library with split-K disallowed."""

    name: str = "cublaslt"

    def __str__(self) -> str:
        return self.name


class Warps(NamedTuple):
    """Programs of a producer warp and two consumer warpgroups (`gpu_fp8`), for tiles of `block_t` rows x `block_n`."""

    block_t: int
    block_n: int
    num_stages: int

    def __str__(self) -> str:
        return f"warps-t{self.block_t}-n{self.block_n}-s{self.num_stages}"


Choice = Tile | Library | Warps


class Range(NamedTuple):
    """`choice` serves T <= max_rows, N <= max_out and K <= max_in."""

    max_rows: int
    max_out: int
    max_in: int
    choice: Choice


ANY = 1 << 62
LIBRARY = Library()

# elements of K after which a partial sum of the fp8 tensor cores goes into the float32 accumulator; where activations
# are fp8, block_k is a multiple of it
PROMOTED = 128

REFERENCE = Tile(64, 64, 64, 4, 3)
FP8_REFERENCE = Tile(64, 64, 128, 4, 3)
# every other choice must agree with this one; it also serves whatever the table does not cover
REFERENCES: dict[Fp8Scheme | None, Tile] = {None: REFERENCE, **dict.fromkeys(Fp8Scheme, FP8_REFERENCE)}
# float32 matmuls are chains of ordinary multiply-adds, outside the tensor cores
FLOAT32 = Tile(16, 64, 32, 4, 2)
# for many rows where the library is not used
MANY_ROWS = Tile(128, 128, 64, 8, 4)

# of a program that walks leaves: three sums may wait beside the one it adds to, all in registers
MOST_WAITING = 64 * 128
MANY_ROWS_OF_LEAVES: dict[Fp8Scheme | None, Tile] = {
    None: Tile(64, 128, 64, 8, 4),
    Fp8Scheme.WEIGHTS: Tile(64, 128, 64, 8, 4),
    Fp8Scheme.WEIGHTS_AND_ACTIVATIONS: Tile(64, 128, 128, 8, 4),
}

TABLES: dict[tuple[str, Fp8Scheme | None], tuple[Range, ...]] = {
    ("sm_90", None): (
        Range(8, 2048, ANY, Tile(8, 16, 256, 1, 6)),
        Range(16, 2048, ANY, Tile(16, 16, 512, 1, 3)),
        Range(32, 2048, ANY, Tile(32, 32, 256, 2, 4)),
        # the library takes ten times as long for some of these row counts
        Range(127, 2048, ANY, Tile(32, 64, 128, 4, 6)),
        Range(16, ANY, 2048, Tile(16, 64, 128, 4, 6)),
        Range(8, 8192, ANY, Tile(8, 64, 128, 4, 6)),
        Range(16, ANY, ANY, Tile(16, 64, 128, 4, 6)),
        Range(32, ANY, ANY, Tile(32, 64, 128, 4, 6)),
        Range(64, 4096, ANY, Tile(32, 64, 128, 4, 6)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(ANY, ANY, ANY, LIBRARY),
    ),
    # weights are widened as they are read
    ("sm_90", Fp8Scheme.WEIGHTS): (
        Range(16, ANY, ANY, Tile(16, 64, 128, 4, 6)),
        Range(32, ANY, ANY, Tile(32, 64, 128, 4, 6)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(ANY, ANY, ANY, MANY_ROWS),
    ),
    ("sm_90", Fp8Scheme.WEIGHTS_AND_ACTIVATIONS): (
        Range(16, ANY, ANY, Tile(16, 64, 256, 4, 5)),
        Range(32, ANY, ANY, Tile(32, 64, 256, 4, 4)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(128, ANY, ANY, Tile(128, 64, 128, 4, 4)),
        Range(ANY, ANY, ANY, Warps(256, 128, 4)),
    ),
}

# instead of `Warps` of 256 rows, where it leaves fewer multiprocessors without a tile at the end
FEWER_ROWS = Warps(128, 128, 5)
# multiprocessors of an H100 or H200, and the time of a row in tiles of 128 rows compared with 256, as measured
MULTIPROCESSORS, FEWER_ROWS_COST = 132, 1.03
# instead of `Warps`, where rows of the output do not begin at a multiple of 16 bytes, or K has leaves
MANY_ROWS_FP8 = Tile(128, 128, 128, 8, 4)

# linear layers fused with their activation: N counts the features of one half, which a program holds of each
FUSED_TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
        Range(8, 4096, ANY, Tile(8, 16, 256, 2, 4)),
        Range(16, ANY, ANY, Tile(16, 64, 128, 4, 4)),
        Range(32, ANY, ANY, Tile(32, 64, 64, 4, 6)),
        Range(64, ANY, ANY, Tile(64, 64, 64, 4, 5)),
    ),
    "any": (Range(16, ANY, ANY, Tile(16, 16, 32, 1, 2)),),
}

# experts: pairs of each on average, and the tile up to there; measured by `benchmarks/gpu_moe.py` (128 experts of 768)
EXPERT_TABLES: dict[tuple[str, Fp8Scheme | None], tuple[tuple[int, Tile], ...]] = {
    ("sm_90", None): (
        (4, Tile(8, 128, 128, 4, 4)),
        (8, Tile(16, 128, 128, 4, 4)),
        (16, Tile(32, 128, 64, 4, 5)),
        (32, Tile(64, 128, 64, 4, 4)),
        (ANY, Tile(128, 256, 64, 8, 3)),
    ),
    ("sm_90", Fp8Scheme.WEIGHTS): (
        (16, Tile(16, 64, 128, 4, 6)),
        (32, Tile(32, 64, 128, 4, 6)),
        (64, Tile(64, 64, 128, 4, 5)),
        (ANY, MANY_ROWS),
    ),
    ("sm_90", Fp8Scheme.WEIGHTS_AND_ACTIVATIONS): (
        (16, Tile(16, 64, 256, 4, 5)),
        (32, Tile(32, 64, 256, 4, 4)),
        (64, Tile(64, 64, 128, 4, 5)),
        (ANY, Tile(128, 128, 128, 8, 4)),
    ),
}

# row counts at which the self-test tries the library, which picks among its own kernels by the number of rows
# fmt: off
LIBRARY_ROWS = (
    65, 66, 72, 80, 88, 96, 104, 112, 120, 127, 128, 129, 144, 160, 176, 192, 200, 224, 240, 255, 256, 257, 288, 320,
    384, 448, 511, 512, 640, 768, 896, 1000, 1024, 1280, 1536, 2000, 2048, 3072, 4095, 4096,
)
# fmt: on


def choose_fused(arch: str, rows: int, width: int, excluded: frozenset[str]) -> Tile | None:
    """The tile that fuses matmul and activation; None where the two run in sequence."""
    for entry in FUSED_TABLES.get(arch, ()):
        if rows <= entry.max_rows and width <= entry.max_out and isinstance(entry.choice, Tile):
            return None if f"fused {entry.choice}" in excluded else entry.choice
    return None


def choose_expert_tile(arch: str, average: int, scheme: Fp8Scheme | None) -> Tile:
    """For experts with `average` pairs on average."""
    return next((tile for most, tile in EXPERT_TABLES.get((arch, scheme), ()) if average <= most), REFERENCES[scheme])


def choose(arch: str, rows: int, w: GpuLinearWeight) -> Choice:
    """The first entry of the table that fits and was not excluded by the self-test; else the reference tile.

    The library only gets shapes that all its tensor-core kernels take, without bias, which it would round separately;
    `MANY_ROWS` replaces it elsewhere. It has no leaves: there, `MANY_ROWS_OF_LEAVES` does.
    """
    reference = REFERENCES[w.scheme]
    for entry in TABLES.get((arch, w.scheme), ()):
        if rows <= entry.max_rows and w.out_features <= entry.max_out and w.in_features <= entry.max_in:
            choice = entry.choice
            if isinstance(choice, Warps):
                choice = _choose_warps(choice, rows, w)
            if w.leaves > 1 and (isinstance(choice, Library) or choice.block_t * choice.block_n > MOST_WAITING):
                choice = MANY_ROWS_OF_LEAVES[w.scheme]
            if isinstance(choice, Library) and (
                w.out_features % 64 or w.in_features % 64 or w.bias is not None or str(choice) in w.excluded
            ):
                choice = MANY_ROWS
            return reference if str(choice) in w.excluded else choice
    return reference


def _choose_warps(warps: Warps, rows: int, w: GpuLinearWeight) -> Choice:
    """`warps` or what replaces it."""
    if _time(FEWER_ROWS, rows, w.out_features) * FEWER_ROWS_COST < _time(warps, rows, w.out_features):
        warps = FEWER_ROWS
    return MANY_ROWS_FP8 if w.leaves > 1 or w.out_features % 8 or str(warps) in w.excluded else warps


def _time(warps: Warps, rows: int, columns: int) -> int:
    """Rows of all tiles that the busiest multiprocessor computes."""
    tiles = -(-rows // warps.block_t) * -(-columns // warps.block_n)
    return -(-tiles // MULTIPROCESSORS) * warps.block_t


def choices(arch: str, w: GpuLinearWeight, max_rows: int) -> dict[Choice, tuple[int, ...]]:
    """Every choice that a weight of this shape may get up to `max_rows`, each with row counts that exercise it."""
    w = replace(w, excluded=frozenset())
    found: dict[Choice, list[int]] = {}
    limits = [min(entry.max_rows, max_rows) for entry in TABLES.get((arch, w.scheme), ())]
    edges = {rows + step for rows in limits for step in (0, 1)} | {1, 2, 3, 5, 7, 11, 24, 48}
    edges.update(LIBRARY_ROWS if w.scheme is None else (100, 200, 300, 1000))
    for rows in sorted(rows for rows in edges if rows <= max_rows):
        found.setdefault(choose(arch, rows, w), []).append(rows)
    if LIBRARY in found:
        found.setdefault(MANY_ROWS, []).extend((found[LIBRARY][0], found[LIBRARY][-1]))
    warps = [rows for choice, counts in found.items() if isinstance(choice, Warps) for rows in counts]
    if warps:
        found.setdefault(MANY_ROWS_FP8, []).extend((warps[0], warps[-1]))
    return {choice: tuple(counts) for choice, counts in found.items()}
