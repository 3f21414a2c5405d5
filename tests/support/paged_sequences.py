"""Random sequences over a paged cache full of NaN, for tests of the GPU's rope and attention on any device.

# S sequences, T tokens, Hq query heads, Hkv key heads, D head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import kernel_reference as reference
import torch
from nonfinite_cases import Damage, sees

from sempre.kernels.attention import AttentionWorkspace, HeadLayout, HeadNorms, KvCache, PagedBatch, ScoreParams
from sempre.kernels.rope import RopeSpec, _frequencies, cos_sin_table

EPS = 1e-6


@dataclass
class PagedSequences:
    """q, k, v rows [T, (Hq + 2 Hkv) D] of each sequence, with scattered block tables."""

    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    block: int = 16
    window: int | None = None
    with_norm: bool = True
    soft_cap: float | None = None
    with_sinks: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.num_heads * 1000 + self.head_dim)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = [torch.randn(n, width, generator=generator).to(self.dtype).to(self.device) for n in self.lengths]
        # before the tables, whose size depends on the blocks: data do not
        norm = torch.rand(self.head_dim, generator=generator) + 0.5
        blocks = [-(-n // self.block) for n in self.lengths]
        self.num_blocks = sum(blocks) + 3
        order = torch.randperm(self.num_blocks, generator=generator).to(torch.int32)
        self.tables = torch.full((len(self.lengths), max(blocks)), -(1 << 20), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(blocks):
            self.tables[row, :count] = order[taken : taken + count]
            taken += count
        self.angles = cos_sin_table(RopeSpec(self.head_dim), max(self.lengths)).to(self.device)
        self.norm = norm.to(self.dtype).to(self.device) if self.with_norm else None
        self.norms = HeadNorms(self.norm, self.norm, EPS) if self.norm is not None else None
        self.heads = HeadLayout(self.num_heads, self.num_kv_heads, self.head_dim)
        sinks = torch.linspace(-1.0, 3.0, self.num_heads).to(self.device) if self.with_sinks else None
        self.scores = ScoreParams(self.head_dim**-0.5, self.window, self.soft_cap, sinks)

    def empty_cache(self) -> KvCache:
        """A cache full of NaN: reading anything unwritten shows."""
        from sempre.kernels.attention import gpu

        device = torch.device(self.device)
        cache = gpu.allocate_kv_cache(self.num_blocks, self.num_kv_heads, self.head_dim, self.block, self.dtype, device)
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
        return cache

    def workspace(self) -> AttentionWorkspace:
        from sempre.kernels.attention.gpu import allocate_attention_workspace

        return allocate_attention_workspace(self.num_heads, self.head_dim, max(self.lengths), torch.device(self.device))

    def step(
        self,
        cache: KvCache,
        parts: list[tuple[int, int, int]],
        *,
        workspace: AttentionWorkspace | None = None,
        padding: int = 0,
        slack: int = 0,
    ) -> list[torch.Tensor]:
        """One step over `parts` (sequence, start, stop): rope, cache write, attention; the outputs of each part.

        `padding` requests without rows are appended; `slack` is added to the host's bounds.
        """
        from sempre.kernels.attention import gpu as attention_gpu
        from sempre.kernels.rope import gpu as rope_gpu

        rows = torch.cat([self.qkv[s][a:b] for s, a, b in parts]).clone()
        positions = torch.cat([torch.arange(a, b) for _, a, b in parts])
        slots = torch.cat(
            [self.tables[s][torch.arange(a, b) // self.block].long() * self.block + torch.arange(a, b) % self.block
             for s, a, b in parts]
        )  # fmt: skip
        rope_gpu.rope_and_cache_write(
            rows, positions.to(self.device), self.angles, slots.to(self.device), cache, self.heads, self.norms
        )
        sizes = [b - a for _, a, b in parts]
        starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist(), *([sum(sizes)] * padding)])
        out = torch.full(
            (rows.shape[0], self.num_heads * self.head_dim), float("nan"), device=self.device, dtype=self.dtype
        )
        batch = PagedBatch(
            self.tables[[s for s, _, _ in parts] + [0] * padding].to(self.device).contiguous(),
            starts.to(torch.int32).to(self.device),
            torch.tensor([b for _, _, b in parts] + [0] * padding, dtype=torch.int32, device=self.device),
            max_query_len=max(sizes) + slack if max(sizes) > 1 or slack else 1,
            max_context_len=max(b for _, _, b in parts) + slack,
        )
        attention_gpu.paged_attention(rows, cache, batch, self.heads, self.scores, out, workspace)
        return list(out.split(sizes))

    def whole(self) -> list[torch.Tensor]:
        return self.step(self.empty_cache(), [(s, 0, n) for s, n in enumerate(self.lengths)])

    def expected(self, s: int) -> torch.Tensor:
        """Float64 attention of sequence `s` [T, Hq D], from rotated q and k rounded as the kernels store them."""
        n = self.lengths[s]
        x = self.qkv[s].cpu().view(n, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = x.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        frequencies = torch.from_numpy(_frequencies(RopeSpec(self.head_dim)))
        rotated = []
        for y in (q, k):
            normed = reference.rms_norm(y, self.norm.cpu(), EPS) if self.norm is not None else y
            rotated.append(reference.rope(normed, torch.arange(n), frequencies).to(self.dtype))
        found = reference.attention(*rotated, v, torch.arange(n), self.scores)
        return found.reshape(n, -1)


def check_damage(
    sequences: PagedSequences, damage: Damage, positions: list[int], parts: list[tuple[int, int, int]]
) -> None:
    """Damage at `positions` of the first sequence changes no row that does not see it, in one step and in `parts`."""
    whole_parts = [(s, 0, n) for s, n in enumerate(sequences.lengths)]
    ways = [whole_parts, parts]
    expected = [_outputs(sequences, way) for way in ways]
    heads, kv_heads = sequences.num_heads, sequences.num_kv_heads
    for position in positions:
        row = sequences.qkv[0][position].view(heads + 2 * kv_heads, sequences.head_dim)
        damage.apply(row[heads : heads + kv_heads], row[heads + kv_heads :])
    seen = sees(sequences.lengths[0], positions, sequences.window)
    for way, clean in zip(ways, expected, strict=True):
        for out, reference_rows, (s, a, b) in zip(_outputs(sequences, way), clean, way, strict=True):
            broken = seen[a:b].to(out.device) if s == 0 else torch.zeros(b - a, dtype=torch.bool, device=out.device)
            assert torch.equal(out[~broken], reference_rows[~broken]), f"sequence {s}, rows {a}..{b}"
            assert not out[broken].isfinite().any(dim=1).any(), "a row that sees the damage must show it"


def _outputs(sequences: PagedSequences, parts: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """The outputs of `parts`, once what comes before them is in the cache."""
    cache = sequences.empty_cache()
    before = [(s, 0, a) for s, a, _ in parts if a]
    if before:
        sequences.step(cache, before)
    return sequences.step(cache, parts, workspace=sequences.workspace())
