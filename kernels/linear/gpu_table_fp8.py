"""Tiles of products on the fp8 tensor cores: a fixed table per architecture, read from the top. T rows, N out, K in.

On sm_90 only tiles of 4 or 8 warps with at least 64 out features run on the fp8 tensor cores (`wgmma`); smaller ones
would be computed in float16, which gives other bits. BLOCK_K is a multiple of PROMOTED. The rows of the table are
those that the bytes to be moved suggest; `benchmarks/gpu_linear.py --scheme fp8` measures them.
"""

from __future__ import annotations

from sempre.kernels.linear.gpu_table import ANY, TABLES, Range, Tile

# elements of K after which a partial sum of the tensor cores goes into the float32 accumulator
PROMOTED = 128

FP8_REFERENCE = Tile(64, 64, 128, 4, 3)

FP8_TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
        Range(8, ANY, ANY, Tile(8, 64, 256, 4, 5)),
        Range(16, ANY, ANY, Tile(16, 64, 256, 4, 5)),
        Range(32, ANY, ANY, Tile(32, 64, 256, 4, 4)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(256, ANY, ANY, Tile(128, 64, 128, 4, 4)),
        Range(ANY, ANY, ANY, Tile(128, 128, 128, 8, 4)),
    ),
}


def choose_fp8(arch: str, rows: int, out_features: int, in_features: int, excluded: frozenset[str]) -> Tile:
    """The first entry of the table that fits and was not excluded by the self-test; else the reference tile."""
    for entry in FP8_TABLES.get(arch, ()):
        if rows <= entry.max_rows and out_features <= entry.max_out and in_features <= entry.max_in:
            assert isinstance(entry.choice, Tile)
            return FP8_REFERENCE if str(entry.choice) in excluded else entry.choice
    return FP8_REFERENCE


def tested_rows(arch: str, max_rows: int) -> list[int]:
    """Row counts up to `max_rows` at which fp8 products are compared: around every limit of a table, and between."""
    limits = {min(entry.max_rows, max_rows) for table in (TABLES, FP8_TABLES) for entry in table.get(arch, ())}
    counts = {1, 2, 3, 5, 7, 11, 24, 48, 100, 200, 300, 1000} | {limit + step for limit in limits for step in (0, 1)}
    return sorted(rows for rows in counts if rows <= max_rows)
