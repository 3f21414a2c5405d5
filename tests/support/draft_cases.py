"""Sequences that a draft model drafts repeatedly, against the same ones as new sequences each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec import structs

from sempre.ipc.messages import DraftRequest, NewRequest, SamplingSpec
from sempre.workers.drafters.model import ModelDrafter

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.1, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.2, "bad_words_token_ids": [[7], [9, 11], [3, 5, 8]], "presence_penalty": 0.4},
    {"temperature": 0.1, "min_tokens": 9, "eos_token_ids": [2], "top_k": 30},
    {"temperature": 0.05, "logit_bias": {5: 0.1}},
]


def make_requests() -> list[NewRequest]:
    """Every kind of sampling."""
    prompts = [[10 + i, *([20, 21, 22 + i] * (1 + 2 * (i % 3)))] for i in range(len(KINDS))]
    return [
        NewRequest(
            request_id=f"r{i}",
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            seed=i,
            params=SamplingSpec(max_tokens=20, **kind),
        )
        for i, (prompt, kind) in enumerate(zip(prompts, KINDS, strict=True))
    ]


def draft_from_scratch(drafter: ModelDrafter, new: NewRequest, tokens: list[int], count: int) -> list[int]:
    """Drafts after `tokens` by a drafter that does not know the request."""
    drafter.add(structs.replace(new, token_ids=tokens.copy()))
    drafts = drafter.propose([DraftRequest(request_id=new.request_id, num_drafts=count)])[0]
    drafter.remove([new.request_id])
    return drafts


def differences(
    drafter: ModelDrafter, make_other: Callable[[], ModelDrafter], rounds: int
) -> list[tuple[list[int], list[int]]]:
    """(found, expected) where drafts differ from those of a drafter to which the sequences are new.

    More sequences than places and blocks; of the drafts, all, none or some are right; some sequences skip rounds.
    """
    drawn = random.Random(5)
    requests = {new.request_id: new for new in make_requests()}
    known = {name: list(new.token_ids) for name, new in requests.items()}
    unseen: dict[str, list[int]] = {}
    for new in requests.values():
        drafter.add(new)
    num_compared = 0
    found_differences: list[tuple[list[int], list[int]]] = []
    for _ in range(rounds):
        counts = {name: drawn.choice([1, 2, 4]) for name in requests if drawn.random() < 0.7}
        asked = [
            DraftRequest(request_id=name, token_ids=unseen.pop(name, []), num_drafts=count)
            for name, count in counts.items()
        ]
        found = dict(zip(counts, drafter.propose(asked), strict=True))
        for name, new in requests.items():
            tokens, drafts = known[name], found.get(name, [])
            left = new.num_prompt_tokens + new.params.max_tokens - 1 - len(tokens)
            if name in counts:
                assert len(drafts) == min(counts[name], left)
                expected = draft_from_scratch(make_other(), new, tokens, counts[name]) if drafts else []
                if drafts != expected:
                    found_differences.append((drafts, expected))
                num_compared += len(drafts)
            num_right = drawn.choice([0, len(drafts), drawn.randint(0, len(drafts))])
            more = drafts[:num_right] + [drawn.randint(3, 300) for _ in range(1 if drafts else drawn.choice([1, 3]))]
            tokens += more
            unseen[name] = unseen.get(name, []) + more
            if len(more) > left:  # it ends, and comes again
                drafter.remove([name])
                known[name] = list(new.token_ids)
                drafter.add(new)
                del unseen[name]
    assert num_compared > 3 * rounds
    return found_differences
