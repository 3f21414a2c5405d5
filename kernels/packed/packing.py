"""Codes in the order of the tensor cores' operands. N out, K in, G groups of K.

A warp's operand of 16 rows and 16 inputs: lane 4 g + c has the rows g and g + 8, and the inputs 2c, 2c + 1, 2c + 8 and
2c + 9. So the words of a block of 16 rows, one after the other, are those of

    unit of inputs, lane (g, c), row g or g + 8, half of the unit

and the numbers of a word, of 8 or 4 inputs, are two interleaved rows of numbers: of each pair of adjacent inputs, the
first in the lower and the second in the upper 16 bits, at the same place.

    bits   0..3     4..7     8..11     12..15    16..19   …      4-bit numbers
    input  2c       2c + 8   2c + 16   2c + 24   2c + 1   …
    bits   0..7              8..15               16..23   …      8-bit numbers
    input  2c                2c + 8              2c + 1   …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sempre.kernels.packed import BLOCK_ROWS, PackedScheme, PackedWeight, can_pack, scheme_of
from sempre.kernels.packed.codes import Codes

# at a time: packing takes several times as much
_PACKED_ROWS = 4096
# float16 and bfloat16 numbers whose last bit counts ones: 1024 and 128
_FLOAT16_ONES, _BFLOAT16_ONES = 0x6400, 0x4300
# beside a larger one, folding both powers of two of an e2m1 number into one would overflow
LARGEST_EXPONENT = 128


def pack_codes(matrices: Sequence[Codes], bias: torch.Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """See the facade."""
    first = matrices[0]
    form, depth, scale_dtype = first.form, first.in_features, first.scales.dtype
    for matrix in matrices:
        if matrix.group_of is not None or not can_pack(form, matrix.out_features, depth, scale_dtype, dtype):
            raise ValueError(f"pack_codes: no kernel for {matrix.out_features} x {depth} of {form} in {dtype}")
        if (matrix.form, matrix.in_features, matrix.scales.dtype) != (form, depth, scale_dtype):
            raise ValueError(f"pack_codes: expected matrices like the first, {form}, found {matrix.form}")
    scheme = scheme_of(form)
    words = [
        _words(replace(matrix, codes=part).numbers(), scheme)
        for matrix in matrices
        for part in torch.split(matrix.codes, _PACKED_ROWS)
    ]
    pairs = [_pairs(matrix, scheme) for matrix in matrices]
    return PackedWeight(
        words=torch.cat(words),
        pairs=torch.cat(pairs, dim=1).contiguous(),
        bias=None if bias is None else bias.to(dtype).contiguous(),
        in_features=depth,
        scheme=scheme,
        scale_dtype=torch.bfloat16 if scheme is PackedScheme.MXFP4 else scale_dtype,
        dtype=dtype,
    )


def _words(numbers: torch.Tensor, scheme: PackedScheme) -> torch.Tensor:
    """uint8 [N, K] → int32 [N / 16, K * bits / 2]"""
    rows, depth = numbers.shape
    # a word's inputs: pairs of two, at places of 8 apart
    places = scheme.unit // 16
    split = numbers.view(rows // BLOCK_ROWS, 2, 8, depth // scheme.unit, 2, places, 4, 2)
    # block, unit, g, c, row, half of the unit; place, of a pair
    ordered = split.permute(0, 3, 2, 6, 1, 4, 5, 7)
    words = torch.zeros(ordered.shape[:6], dtype=torch.int32, device=numbers.device)
    for place in range(places):
        for second in range(2):
            words |= ordered[..., place, second].to(torch.int32) << (scheme.bits * place + 16 * second)
    return words.view(rows // BLOCK_ROWS, -1)


def _pairs(matrix: Codes, scheme: PackedScheme) -> torch.Tensor:
    """int32 [G, N]"""
    if scheme is PackedScheme.MXFP4:
        largest = int(matrix.scales.max())
        if largest > LARGEST_EXPONENT:
            raise ValueError(f"pack_codes: expected exponents of at most {LARGEST_EXPONENT}, found {largest}")
        # bfloat16's 2 ** (scale - 1): the numbers' own exponents begin at 2 ** -126
        return ((matrix.scales.to(torch.int32) + 126) << 7).t()
    scales = matrix.scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    middle = torch.full_like(scales, matrix.form.middle)
    zeros = middle if matrix.zeros is None else matrix.zeros.to(torch.int32)
    # 8-bit numbers have more bits than bfloat16's
    in_bfloat16 = scheme is PackedScheme.INT4 and matrix.scales.dtype is torch.bfloat16
    ones = _BFLOAT16_ONES if in_bfloat16 else _FLOAT16_ONES
    return (scales | ((ones + zeros) << 16)).t()
