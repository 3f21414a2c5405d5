"""Tiles of products on the fp8 tensor cores: a fixed table per architecture, read from the top. T rows, N out, K in.

On sm_90 only tiles of 4 or 8 warps with at least 64 out features and 16 rows give one another's bits, whether the
activations are fp8 or the weights alone: a smaller tile is computed by other instructions. For fp8 activations
BLOCK_K is a multiple of PROMOTED. `benchmarks/gpu_linear.py --scheme fp8` measures the rows of the tables.
"""

from __future__ import annotations

from sempre.kernels.linear.gpu_table import ANY, MANY_ROWS, Range, Tile

# elements of K after which a partial sum of the tensor cores goes into the float32 accumulator
PROMOTED = 128

FP8_REFERENCE = Tile(64, 64, 128, 4, 3)

FP8_TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
        Range(16, ANY, ANY, Tile(16, 64, 256, 4, 5)),
        Range(32, ANY, ANY, Tile(32, 64, 256, 4, 4)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(256, ANY, ANY, Tile(128, 64, 128, 4, 4)),
        Range(ANY, ANY, ANY, Tile(128, 128, 128, 8, 4)),
    ),
}

# weights alone are fp8: widened as they are read
WEIGHT_ONLY_TABLES: dict[str, tuple[Range, ...]] = {
    "sm_90": (
        Range(16, ANY, ANY, Tile(16, 64, 128, 4, 6)),
        Range(32, ANY, ANY, Tile(32, 64, 128, 4, 6)),
        Range(64, ANY, ANY, Tile(64, 64, 128, 4, 5)),
        Range(ANY, ANY, ANY, MANY_ROWS),
    ),
}


def choose_fp8(
    tables: dict[str, tuple[Range, ...]],
    arch: str,
    rows: int,
    out_features: int,
    in_features: int,
    excluded: frozenset[str],
) -> Tile:
    """The first entry of the table that fits and was not excluded by the self-test; else the reference tile."""
    for entry in tables.get(arch, ()):
        if rows <= entry.max_rows and out_features <= entry.max_out and in_features <= entry.max_in:
            assert isinstance(entry.choice, Tile)
            return FP8_REFERENCE if str(entry.choice) in excluded else entry.choice
    return FP8_REFERENCE


def tested_rows(arch: str, max_rows: int) -> list[int]:
    """Row counts up to `max_rows` at which fp8 products are compared: around every limit of a table, and between."""
    limits = {
        min(entry.max_rows, max_rows) for table in (WEIGHT_ONLY_TABLES, FP8_TABLES) for entry in table.get(arch, ())
    }
    counts = {1, 2, 3, 5, 7, 11, 24, 48, 100, 200, 300, 1000} | {limit + step for limit in limits for step in (0, 1)}
    return sorted(rows for rows in counts if rows <= max_rows)
