"""A18 on a GPU: keys of a common prefix are read once for many requests, or once for each, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_workload import launch_inproc, prompt, run_inproc

from sempre.engine.harness import compare_generations, generate, make_request
from sempre.ipc.messages import RequestSpec
from sempre.workers.gpu import shared_splits

pytestmark = pytest.mark.gpu

SYSTEM, TOOLS = prompt(900, 1100), prompt(901, 600)
COUNT, SETTINGS = 40, {"max_num_seqs": 48, "max_num_batched_tokens": 2048}


def _requests() -> list[RequestSpec]:
    """One system prompt, half of the requests with tools after it, and a few without either."""
    prompts = []
    for index in range(COUNT):
        own = prompt(300 + index, 1 + index % 70)
        common = [] if index % 10 == 9 else SYSTEM + (TOOLS if index % 2 else [])
        prompts.append([*common, *own])
    return [
        make_request(tokens, seed=index, ordinal=index, max_tokens=9, logprobs=2, temperature=1.0)
        for index, tokens in enumerate(prompts)
    ]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of each decode step that read keys for all."""
    found: list[int] = []
    of_step = shared_splits.SharedSplits.of_step

    def noted(self: Any, *arguments: Any) -> Any:
        prefixes = of_step(self, *arguments)
        if prefixes is not None:
            found.append(int(prefixes.arrays.counts.sum()))
        return prefixes

    monkeypatch.setattr(shared_splits.SharedSplits, "of_step", noted)
    return found


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"max_num_seqs": 20}, {"block_size": 16}], ids=str)
def test_a_common_prefix_is_not_seen(shared: list[int], settings: dict[str, Any]) -> None:
    requests = _requests()
    expected = run_inproc(requests, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=1)
    assert not shared
    client = launch_inproc(**(SETTINGS | settings))
    try:
        # its blocks are cached before the others come
        generate(client, [make_request([*SYSTEM, *TOOLS, 5], ordinal=0, max_tokens=1)])
        run = generate(client, requests)
    finally:
        client.close()
    assert max(shared) > 32, "so many splits are shared by two requests or more"
    comparison = compare_generations(expected, run)
    assert comparison.equal, comparison.first_difference


def test_groups_of_other_blocks_are_noticed(shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: requests whose prefixes differ, grouped as if they did not."""
    requests = [
        # so long that most decode at the same time: few shared splits do not pay, and are read for each
        make_request(prompt(400 + index, 1030), seed=index, ordinal=index, max_tokens=24, temperature=1.0, logprobs=1)
        for index in range(24)
    ]
    expected = run_inproc(requests, **SETTINGS)
    assert not shared
    hold = shared_splits.SharedSplits._hold
    monkeypatch.setattr(shared_splits.SharedSplits, "_hold", lambda self, key: hold(self, key[:4]))
    run = run_inproc(requests, **SETTINGS)
    assert shared
    assert not compare_generations(expected, run).equal
