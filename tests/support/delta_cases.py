"""Random gated delta layers with a float64 reference, and ways to compute their rows in steps, on any device.

# R requests, T rows, V value heads, Dk and Dv dimensions, C channels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sempre.kernels.gated_delta import DeltaHeads, DeltaWeights, gated_delta
from sempre.kernels.states import LayerState, StateBatch, allocate_layer_state

# (K, V, Dk, Dv, W): the real shape made narrow, one key head, more values than keys and the other way round
SHAPES = [
    DeltaHeads(2, 4, 32, 32, 4),
    DeltaHeads(1, 3, 16, 48, 2),
    DeltaHeads(3, 3, 48, 16, 3),
    DeltaHeads(1, 2, 128, 128, 4),
]
EPS = 1e-6


@dataclass
class DeltaCase:
    """Sequences of the given lengths, and the layer that computes them."""

    heads: DeltaHeads
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    run: Callable[..., torch.Tensor] = gated_delta

    def __post_init__(self) -> None:
        heads = self.heads
        generator = torch.Generator().manual_seed(heads.channels + heads.conv_width)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * scale

        width = heads.channels + heads.values
        self.rows = [random(n, width).to(self.dtype).to(self.device) for n in self.lengths]
        self.ba = [random(n, 2 * heads.num_value_heads, scale=3.0).to(self.device) for n in self.lengths]
        self.weights = DeltaWeights(
            heads,
            conv=random(heads.conv_width, heads.channels).to(self.device),
            rate=-(random(heads.num_value_heads).exp()).to(self.device),
            offset=random(heads.num_value_heads).to(self.device),
            norm=(1 + random(heads.value_dim, scale=0.3)).to(self.device),
            eps=EPS,
        )

    def states(self, num_slots: int) -> LayerState:
        """Slots full of NaN: reading what was not written shows."""
        state = allocate_layer_state(self.heads.states, num_slots, self.dtype, self.device)
        state.recurrent.fill_(float("nan"))
        state.conv.fill_(float("nan"))
        return state

    def step(
        self, state: LayerState, parts: list[tuple[int, int, int]], reads: list[int], writes: list[list[int]]
    ) -> list[torch.Tensor]:
        """One step over `parts` (sequence, start, stop), each with the slot it reads and those its rows write."""
        heads, device = self.heads, self.device
        rows = torch.cat([self.rows[s][a:b] for s, a, b in parts])
        ba = torch.cat([self.ba[s][a:b] for s, a, b in parts])
        sizes = [b - a for _, a, b in parts]
        assert [len(slots) for slots in writes] == sizes

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        batch = StateBatch(int32(reads), int32([slot for slots in writes for slot in slots]), int32(starts))
        mixed = torch.full((len(rows), heads.channels), float("nan"), dtype=self.dtype, device=device)
        out = torch.full((len(rows), heads.values), float("nan"), dtype=self.dtype, device=device)
        return list(self.run(rows, ba, self.weights, state, batch, mixed, out).split(sizes))

    def whole(self) -> tuple[list[torch.Tensor], LayerState]:
        """All sequences in one step; slot s has the last state of sequence s."""
        state = self.states(len(self.lengths))
        parts = [(s, 0, n) for s, n in enumerate(self.lengths)]
        writes = [[-1] * (n - 1) + [s] for s, n in enumerate(self.lengths)]
        return self.step(state, parts, [-1] * len(parts), writes), state

    def expected(self, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 rows [n, V Dv] and last recurrent state [V, Dk, Dv] of sequence `s`."""
        heads, n = self.heads, self.lengths[s]
        x, ba = self.rows[s].double().cpu(), self.ba[s].double().cpu()
        conv, rate, offset, norm = (
            getattr(self.weights, name).double().cpu() for name in ("conv", "rate", "offset", "norm")
        )
        channels = x[:, : heads.channels]
        padded = torch.cat([torch.zeros(heads.conv_width - 1, heads.channels, dtype=torch.float64), channels])
        mixed = torch.nn.functional.silu(sum(padded[j : j + n] * conv[j] for j in range(heads.conv_width)))
        keys = heads.num_key_heads * heads.key_dim
        q, k = (part.view(n, heads.num_key_heads, heads.key_dim) for part in mixed[:, : 2 * keys].split(keys, dim=1))
        v = mixed[:, 2 * keys :].view(n, heads.num_value_heads, heads.value_dim)
        group = heads.num_value_heads // heads.num_key_heads
        q, k = ((y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(group, dim=1) for y in (q, k))
        beta, decay = ba[:, : len(rate)].sigmoid(), (rate * torch.log1p((ba[:, len(rate) :] + offset).exp())).exp()
        state, rows = torch.zeros(heads.states[:3], dtype=torch.float64), []
        for t in range(n):
            state = state * decay[t][:, None, None]
            recalled = torch.einsum("vkd,vk->vd", state, k[t])
            state = state + torch.einsum("vk,vd->vkd", k[t], (v[t] - recalled) * beta[t][:, None])
            rows.append(torch.einsum("vkd,vk->vd", state, q[t] / heads.key_dim**0.5))
        o = torch.stack(rows)
        normed = o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
        z = x[:, heads.channels :].view(n, heads.num_value_heads, heads.value_dim)
        return (normed * torch.nn.functional.silu(z)).reshape(n, -1), state


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the error over that of the expected values."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def check_cuts(case: DeltaCase) -> None:
    """Rows and states of two sequences or more have their bits however they are cut, in whatever slots, in place or
    not, beside whatever others."""
    whole, last = case.whole()
    first, second = case.lengths[:2]
    for cuts in ([1, 2, 3, 4, first], [first - 1, first], [5, 6, first]):
        state = case.states(4)
        live, found, before = -1, [], 0
        for index, end in enumerate(cuts):
            size = end - before
            target = (index + 1) % 3 if index % 2 else max(live, 0)
            parts, reads, writes = [(0, before, end)], [live], [[-1] * (size - 1) + [target]]
            if index == 1:  # beside another
                parts.insert(0, (1, 0, second))
                reads.insert(0, -1)
                writes.insert(0, [-1] * (second - 1) + [3])
            results = case.step(state, parts, reads, writes)
            if index == 1:
                assert torch.equal(results[0], whole[1])
            found.append(results[-1])
            live, before = target, end
        assert torch.equal(torch.cat(found), whole[0]), cuts
        assert torch.equal(state.recurrent[live], last.recurrent[0]), cuts
        assert torch.equal(state.conv[live], last.conv[0]), cuts


def check_verification(case: DeltaCase) -> None:
    """Every row of a step may write, also to the slot that was read, first, in between or last; the next step goes on
    from any of them."""
    whole, _ = case.whole()
    base, rows = 6, 5
    for in_place in range(rows):
        for accepted in range(rows):
            state = case.states(rows + 1)
            case.step(state, [(0, 0, base)], [-1], [[-1] * (base - 1) + [2]])
            slots = [slot for slot in range(rows + 1) if slot != 2][:rows]
            slots[in_place] = 2
            found = case.step(state, [(0, base, base + rows)], [2], [slots])[0]
            assert torch.equal(found, whole[0][base : base + rows])
            at = base + accepted + 1
            again = case.step(state, [(0, at, at + 1)], [slots[accepted]], [[-1]])[0]
            assert torch.equal(again, whole[0][at : at + 1]), (in_place, accepted)
