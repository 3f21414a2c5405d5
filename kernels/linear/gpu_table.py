"""Which kernel computes a product on a GPU: a fixed table per architecture, read from the top, never tuned as it runs.

Every choice gives the same bits (the self-test checks it), so a row only states what was fastest when measured by
`benchmarks/gpu_linear.py`. T rows of x, N out features, K in features.
"""

from __future__ import annotations

from typing import NamedTuple


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


Choice = Tile | Library


class Range(NamedTuple):
    """`choice` serves T <= max_rows, N <= max_out and K <= max_in."""

    max_rows: int
    max_out: int
    max_in: int
    choice: Choice


ANY = 1 << 62
LIBRARY = Library()

# every other choice must agree with this one; it also serves what the table leaves out
REFERENCE = Tile(64, 64, 64, 4, 3)
# float32 products are chains of ordinary multiply-adds, outside the tensor cores
FLOAT32 = Tile(16, 64, 32, 4, 2)
# for many rows where the library is not taken
MANY_ROWS = Tile(128, 128, 64, 8, 4)

TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
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
}

# the product fused with the activation: N counts the features of one half, which a program holds of each
FUSED_TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
        Range(8, 4096, ANY, Tile(8, 16, 256, 2, 4)),
        Range(16, ANY, ANY, Tile(16, 64, 128, 4, 4)),
        Range(32, ANY, ANY, Tile(32, 64, 64, 4, 6)),
        Range(64, ANY, ANY, Tile(64, 64, 64, 4, 5)),
    ),
    "any": (Range(16, ANY, ANY, Tile(16, 16, 32, 1, 2)),),
}

# row counts at which the self-test tries the library, which picks among its own kernels by the number of rows
# fmt: off
LIBRARY_ROWS = (
    65, 66, 72, 80, 88, 96, 104, 112, 120, 127, 128, 129, 144, 160, 176, 192, 200, 224, 240, 255, 256, 257, 288, 320,
    384, 448, 511, 512, 640, 768, 896, 1000, 1024, 1280, 1536, 2000, 2048, 3072, 4095, 4096,
)
# fmt: on


def choose_fused(arch: str, rows: int, width: int, excluded: frozenset[str]) -> Tile | None:
    """The tile that fuses product and activation; None where the two run one after the other."""
    for entry in FUSED_TABLES.get(arch, ()):
        if rows <= entry.max_rows and width <= entry.max_out and isinstance(entry.choice, Tile):
            return None if f"fused {entry.choice}" in excluded else entry.choice
    return None


def choose(arch: str, rows: int, out_features: int, in_features: int, excluded: frozenset[str]) -> Choice:
    """The first entry of the table that fits and was not excluded by the self-test; else the reference tile.

    The library only gets shapes that all its tensor-core kernels take; `MANY_ROWS` stands in for it elsewhere.
    """
    for entry in TABLES.get(arch, ()):
        if rows <= entry.max_rows and out_features <= entry.max_out and in_features <= entry.max_in:
            choice = entry.choice
            if isinstance(choice, Library) and (out_features % 64 or in_features % 64 or str(choice) in excluded):
                choice = MANY_ROWS
            return REFERENCE if str(choice) in excluded else choice
    return REFERENCE


def choices(arch: str, out_features: int, in_features: int, max_rows: int) -> dict[Choice, tuple[int, ...]]:
    """Every choice that a weight of this shape may meet up to `max_rows`, each with row counts that exercise it."""
    found: dict[Choice, list[int]] = {}
    limits = [min(entry.max_rows, max_rows) for entry in TABLES.get(arch, ())]
    edges = {rows + step for rows in limits for step in (0, 1)} | {1, 2, 3, 5, 7, 11, 24, 48, *LIBRARY_ROWS}
    for rows in sorted(rows for rows in edges if rows <= max_rows):
        found.setdefault(choose(arch, rows, out_features, in_features, frozenset()), []).append(rows)
    if LIBRARY in found:
        found.setdefault(MANY_ROWS, []).extend((found[LIBRARY][0], found[LIBRARY][-1]))
    return {choice: tuple(counts) for choice, counts in found.items()}
