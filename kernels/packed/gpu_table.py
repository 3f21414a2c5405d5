"""Which kernel multiplies a packed weight on a GPU: a fixed table per architecture, read from the top, never tuned at
run time. Every choice gives the same bits (the self-test checks it). T rows of x, N out features, K in features.

On sm_90 a tile has at least 64 out features, 16 rows and 4 warps: a smaller one uses other instructions, which take the
inputs in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sempre.kernels.packed import PackedScheme, PackedWeight

ANY = 1 << 62


class PackedTile(NamedTuple):
    """A program owns `block_t` rows x `block_n` out features and walks K in steps of `block_k`."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"packed-t{self.block_t}-n{self.block_n}-k{self.block_k}-w{self.num_warps}-s{self.num_stages}"


class Widened(NamedTuple):
    """Widened into scratch memory, then as any matrix."""

    name: str = "widened"

    def __str__(self) -> str:
        return self.name


PackedChoice = PackedTile | Widened
WIDENED = Widened()


class Range(NamedTuple):
    """`choice` serves T <= max_rows, N <= max_out."""

    max_rows: int
    max_out: int
    choice: PackedChoice


# of one chain over K few programs exist where N is small, and longer steps keep more of the weight on its way
_INT4 = (
    Range(16, 8192, PackedTile(16, 64, 512, 4, 3)),
    Range(16, ANY, PackedTile(16, 64, 256, 4, 4)),
    Range(32, ANY, PackedTile(32, 64, 256, 4, 3)),
    Range(64, 4096, PackedTile(32, 64, 256, 4, 4)),
    Range(64, 8192, PackedTile(64, 64, 256, 4, 3)),
    Range(64, ANY, PackedTile(64, 128, 128, 8, 3)),
    Range(128, 4096, PackedTile(64, 64, 256, 4, 3)),
    Range(256, ANY, PackedTile(128, 64, 64, 4, 5)),
    Range(ANY, ANY, WIDENED),
)

TABLES: dict[tuple[str, PackedScheme], tuple[Range, ...]] = {
    ("sm_90", PackedScheme.INT4): _INT4,
    # scales of 32 inputs take their share of longer steps
    ("sm_90", PackedScheme.MXFP4): (
        Range(16, ANY, PackedTile(16, 64, 256, 4, 4)),
        Range(32, ANY, PackedTile(32, 64, 256, 4, 3)),
        Range(64, 8192, PackedTile(32, 64, 256, 4, 3)),
        Range(64, ANY, PackedTile(64, 64, 128, 4, 4)),
        Range(256, ANY, PackedTile(128, 64, 64, 4, 5)),
        Range(ANY, ANY, WIDENED),
    ),
    ("sm_90", PackedScheme.INT8): (
        Range(16, ANY, PackedTile(16, 64, 256, 4, 4)),
        Range(32, ANY, PackedTile(32, 64, 256, 4, 3)),
        Range(64, ANY, PackedTile(64, 64, 128, 4, 4)),
        Range(256, ANY, PackedTile(128, 64, 64, 4, 5)),
        Range(ANY, ANY, WIDENED),
    ),
}


def fits(tile: PackedTile, w: PackedWeight) -> bool:
    """Whether a tile's inputs are whole groups, or lie in one."""
    return w.group % tile.block_k == 0 or tile.block_k % w.group == 0 or w.group == w.in_features


def choose(arch: str, rows: int, w: PackedWeight) -> PackedChoice:
    """The first entry of the table that fits and was not excluded by the self-test; else widening."""
    for entry in TABLES.get((arch, w.scheme), ()):
        if rows <= entry.max_rows and w.out_features <= entry.max_out:
            choice = entry.choice
            if isinstance(choice, PackedTile) and (not fits(choice, w) or str(choice) in w.excluded):
                return WIDENED
            return choice
    return WIDENED


def choices(arch: str, w: PackedWeight, max_rows: int) -> dict[PackedTile, tuple[int, ...]]:
    """Every tile that a weight of this shape may get up to `max_rows`, each with row counts that exercise it."""
    w = replace(w, excluded=frozenset())
    limits = [min(entry.max_rows, max_rows) for entry in TABLES.get((arch, w.scheme), ())]
    edges = {rows + step for rows in limits for step in (0, 1)} | {1, 2, 3, 5, 7, 11, 24, 48, 100, 200}
    found: dict[PackedTile, list[int]] = {}
    for rows in sorted(rows for rows in edges if rows <= max_rows):
        choice = choose(arch, rows, w)
        if isinstance(choice, PackedTile):
            found.setdefault(choice, []).append(rows)
    return {choice: tuple(counts) for choice, counts in found.items()}
