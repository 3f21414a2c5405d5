"""Ranks that share no memory give the bits of one worker: sums and hidden states travel over links of hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_spec, save_adapter, tiny_modules
from rank_links import linked
from ranks import Ranks, on_all_ranks

from sempre.engine import checkpoints as checkpoints_of_the_package
from sempre.ipc.errors import EngineUnhealthy, ProtocolError
from sempre.workers.cpu.linked_exchange import LinkedExchange
from sempre.workers.cpu.linked_stages import LinkedStages
from sempre.workers.parallel import WrittenRows

TOKENS = [(7919 * i + 11) % 320 for i in range(45)]
CUTS = (1, 18, 44)
TINY = Path(checkpoints_of_the_package.__file__).parent / "tiny"

Checkpoints = Callable[[str], Any]


@pytest.mark.parametrize(
    ("name", "size", "num_stages"),
    [
        ("tiny", 2, 1),
        pytest.param("qwen3-moe", 2, 2, marks=pytest.mark.product),
        pytest.param("llama", 1, 3, marks=pytest.mark.product),
        pytest.param("qwen3.5", 1, 3, marks=pytest.mark.product),
        pytest.param("tiny", 2, 2, marks=pytest.mark.product),
    ],
)
def test_linked_ranks_are_as_one(
    name: str, size: int, num_stages: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """`tiny` with an adapter."""
    folder = TINY if name == "tiny" else checkpoints(name).folder
    settings: dict[str, Any] = {"profile": "single" if size == 1 else "tree8"}
    if name == "tiny":
        settings |= {"enable_lora": True, "adapter": adapter_spec(save_adapter(tmp_path, tiny_modules()))}
    [expected] = Ranks(folder, 1, **settings).logits(TOKENS)
    with linked(size * num_stages) as links:
        ranks = Ranks(folder, size, num_stages=num_stages, links=links, **settings)
        for rank, found in enumerate(ranks.logits(TOKENS, CUTS)):
            assert torch.equal(found, expected), f"rank {rank} of the last stage"


def test_control_a_part_that_is_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    [expected] = Ranks(TINY, 1).logits(TOKENS)
    put = LinkedExchange._put

    def dropped(self: LinkedExchange, place: int, rank: int, found: list[bytes], written: Any) -> None:
        put(self, place, rank, found if written is not None else [bytes(len(found[0]))], written)

    monkeypatch.setattr(LinkedExchange, "_put", dropped)
    with linked(2) as links:
        assert not torch.equal(Ranks(TINY, 2, links=links).logits(TOKENS)[0], expected)


def _values(number: int, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) * (number + 1) + rank


def test_every_rank_gets_what_all_have_written() -> None:
    """Own slots, or rows of the first one, of which a rank may have none."""

    def run(rank: int) -> int:
        exchange, wrong = exchanges[rank], 0
        for number in range(60):
            rows, width = 1 + number % 5, 1 + 7 * number % 40
            slots = exchange.slots(rows, width)
            if number % 3:
                slots[rank] = _values(number, rank, (rows, width))
                exchange.wait()
                wrong += sum(not torch.equal(slots[peer], _values(number, peer, (rows, width))) for peer in range(3))
            else:
                shared = slots[0]
                places = torch.arange(rank, max(rank, rows), 3)
                shared[places] = _values(number, 0, (rows, width))[places]
                exchange.wait(WrittenRows(shared, places))
                wrong += not torch.equal(shared, _values(number, 0, (rows, width)))
        return wrong

    with linked(3, first=3) as links:
        exchanges = [LinkedExchange(link, 3 + rank, range(3, 6), patience_s=20.0) for rank, link in enumerate(links)]
        assert on_all_ranks(3, run) == [0, 0, 0]


def test_hidden_states_and_reports_arrive_in_order() -> None:
    def run(rank: int) -> int:
        stage, wrong = stages[rank], 0
        for number in range(60):
            shape = (1 + number % 7, 1 + 13 * number % 50)
            branch, residual = torch.empty(shape), _values(number, 0, shape)
            if rank:
                residual = torch.empty(shape)
                wrong += stage.take_over(branch, residual) != bool(number % 2)
                wrong += not torch.equal(residual, _values(number, 0, shape))
                wrong += bool(number % 2) and not torch.equal(branch, -residual)
            if rank < 2:
                stage.pass_on(-residual if number % 2 else None, residual)
                wrong += stage.next_report() != b"tokens" * number
            else:
                stage.report(b"tokens" * number)
        return wrong

    with linked(3) as links:
        stages = [LinkedStages(link, rank, range(3), patience_s=20.0) for rank, link in enumerate(links)]
        assert on_all_ranks(3, run) == [0, 0, 0]
        stages[0].pass_on(None, torch.zeros(3, 8))
        with pytest.raises(
            ProtocolError, match=r"rank 1: expected .* of 4 rows and width 8 from rank 0, found 3 and 8"
        ):
            stages[1].take_over(torch.zeros(4, 8), torch.zeros(4, 8))


def test_what_does_not_fit_is_refused() -> None:
    with linked(2) as links:
        exchange = LinkedExchange(links[0], 0, range(2), patience_s=0.3)
        exchange.slots(2, 4)
        with pytest.raises(EngineUnhealthy, match=r"rank 0: expected rank 1 to send within 0\.3 s"):
            exchange.wait()
        links[1].send(0, [bytes(16)])
        with pytest.raises(ProtocolError, match=r"expected parts of \[32\] bytes from rank 1, found \[16\]"):
            exchange.wait()
        links[1].send(0, [(7).to_bytes(8, "little"), bytes(16)])
        with pytest.raises(ProtocolError, match="expected rows below 2 from rank 1, found 7 to 7"):
            exchange.wait(WrittenRows(exchange.slots(2, 4)[0], torch.arange(1)))
