"""Speculative decoding: tokens per target step, and speed with it against without, in one run.

    python benchmarks/speculation.py                                         # tiny with tiny-draft, coupled and greedy
    python benchmarks/speculation.py --model smollm2-135m --methods ngram    # on a GPU: lookup

Greedy drafting: the same draft model drafts at temperature 0. Engines are off, on, off, on, …; figures are medians.
Everything runs in this process, on the same prompts, and the outputs of all engines must be equal. Seeds differ between
repetitions; at temperature 0 `suffix` finds the text of the previous one, as it would in a cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from sempre.engine import LLM, Counter, SamplingParams
from sempre.ipc.messages import NewRequest
from sempre.workers.drafters.model import ModelDrafter

PARAGRAPH = (
    "The committee met on Tuesday to consider the report on the northern bridge. Its members agreed that the bridge "
    "must be repaired before the winter, that the cost shall be shared between the two towns, and that the road to the "
    "mill stays closed until the work is done."
)
CODE = """def area(width, height):
    total = width * height
    return total

def volume(width, height, depth):
    total = width * height * depth
    return total
"""
REPEATING = [
    f"{PARAGRAPH}\n\nThe text again, word for word:\n\n{PARAGRAPH}\n\nThe text again, word for word:\n\n",
    f"{CODE}\n# the same code, with the name total changed to result\n{CODE.replace('total', 'result')}\n"
    f"# the same code once more\n",
    f"Text: {PARAGRAPH}\nSummary: {PARAGRAPH.split('. ')[0]}.\n\nText: {PARAGRAPH}\nSummary:",
]
PROSE = [
    "It is a truth universally acknowledged",
    "The captain of the ship",
    "To the Senate and House of Representatives:",
]
PROMPTS = {"repeating": REPEATING, "prose": PROSE}


def main() -> None:
    options = _parse()
    print(f"{options.model}, {options.num_requests} request(s), {options.max_tokens} tokens each, k={options.k}")
    print("| prompts | T | drafting | tokens per step | kept drafts | off | on | speed-up |")
    print("|---|---|---|---|---|---|---|---|")
    settings: dict[str, Any] = {"multiprocessing": False, "num_threads": options.num_threads, "device": options.device}
    # two engines share a GPU
    settings |= {"max_model_len": 1024, "max_num_seqs": max(8, options.num_requests), "gpu_memory_utilization": 0.4}
    with LLM(options.model, **settings) as off:
        for method in options.methods:
            config: dict[str, Any] = {"method": method, "num_speculative_tokens": options.k}
            if method in ("coupled", "greedy"):
                config |= {"method": "draft_model", "model": options.draft_model, "placement": options.placement}
            for adaptive in (False, True):
                with (
                    _drafting(method),
                    LLM(options.model, **settings, speculative_config=config | {"adaptive": adaptive}) as on,
                ):
                    for kind in options.prompts:
                        for temperature in (0.0, 0.7, 1.0):
                            if method == "greedy" and temperature == 0.0:
                                continue  # the same as coupled
                            name = f"{method}, k {'adaptive' if adaptive else 'fixed'}"
                            _row(off, on, kind, temperature, name, options)


def _row(off: LLM, on: LLM, kind: str, temperature: float, name: str, options: argparse.Namespace) -> None:
    prompts = [PROMPTS[kind][i % len(PROMPTS[kind])] for i in range(options.num_requests)]
    seconds: dict[LLM, list[float]] = {off: [], on: []}
    before = _counts(on)
    for repetition in range(options.repetitions + 1):
        # other seeds each time: recent outputs must not contain the text being generated
        params = [
            SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=seed, ignore_eos=True)
            for seed in range(1000 * repetition, 1000 * repetition + options.num_requests)
        ]
        outputs = []
        for llm in (off, on):
            began = time.perf_counter()
            results = llm.generate(prompts, params, use_tqdm=False)
            if repetition:  # the first one warms up
                seconds[llm].append(time.perf_counter() - began)
            outputs.append([result.outputs[0].token_ids for result in results])
        assert outputs[0] == outputs[1], "speculation changed an output"
    drafts, tokens, accepted = (now - then for now, then in zip(_counts(on), before, strict=True))
    # per request and step: one token, plus the accepted drafts
    total = (options.repetitions + 1) * options.num_requests * options.max_tokens
    per_step = total / (total - accepted)
    share = f"{accepted / tokens:.0%} of {tokens / drafts:.1f}" if drafts else "none"
    speeds = [options.num_requests * options.max_tokens / statistics.median(seconds[llm]) for llm in (off, on)]
    print(
        f"| {kind} | {temperature} | {name} | {per_step:.2f} | {share} | {speeds[0]:.0f} tok/s | {speeds[1]:.0f} tok/s "
        f"| {speeds[1] / speeds[0]:.2f} |",
        flush=True,
    )


def _counts(llm: LLM) -> tuple[int, int, int]:
    """Drafts, draft tokens, accepted tokens."""
    values = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    drafts, tokens, accepted = (
        int(values[f"sempre:spec_decode_num_{name}"]) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return drafts, tokens, accepted


@contextmanager
def _drafting(method: str) -> Iterator[None]:
    """In this context, a draft model drafts greedily if `method` says so."""
    add = ModelDrafter.add

    def add_greedy(self: ModelDrafter, new: NewRequest) -> None:
        add(self, replace(new, params=replace(new.params, temperature=0.0)))

    if method == "greedy":
        ModelDrafter.add = add_greedy  # type: ignore[method-assign]
    try:
        yield
    finally:
        ModelDrafter.add = add  # type: ignore[method-assign]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--draft-model", default="tiny-draft")
    parser.add_argument("--placement", default="colocated", choices=["colocated", "worker"], help="of the draft model")
    parser.add_argument("--methods", nargs="+", default=["coupled", "greedy", "ngram"])
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--num-requests", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
