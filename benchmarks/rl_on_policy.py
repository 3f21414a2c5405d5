"""Reinforcement learning without a mismatch between sampling and training: REINFORCE on a checkable reward.

Each step samples outputs with the engine, computes their log-probabilities anew in the trainer, takes one step along
the gradient of the advantage, and gives the engine the new weights. The reward is the share of one letter among the
letters of an output.

Metric: the largest difference between the log-probabilities that the engine reported and those that the trainer
computed, over all steps, which must be exactly 0, so that every importance ratio is exactly 1; and the mean reward of
the first and of the last steps, of which the latter must be larger. It ends with exit code 1 otherwise.

    python benchmarks/rl_on_policy.py                                  # tiny, on a CPU
    python benchmarks/rl_on_policy.py --model smollm2-135m --steps 3
    python benchmarks/rl_on_policy.py --device cuda --dtype bfloat16

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sempre.engine import LLM, RequestOutput, SamplingParams
from sempre.engine.version import __version__
from sempre.workers.trainer import Trainer

# of different lengths, with a common beginning that the engine caches
TIMES = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
PROMPTS = ("It was", TIMES, TIMES + "it was the epoch of belief,", "And God said,")
LETTER = "e"


@dataclass
class Step:
    """What one step of training found."""

    reward: float
    largest_difference: float
    largest_ratio_error: float
    num_tokens: int
    num_cached_tokens: int


def reward(text: str) -> float:
    """The share of the letter among the letters of a text."""
    letters = [character for character in text.lower() if character.isalpha()]
    return letters.count(LETTER) / max(1, len(letters))


def sampled(llm: LLM, step: int, samples: int, max_tokens: int) -> list[RequestOutput]:
    """Outputs of all prompts, `samples` of each, with seeds of this step."""
    # fills the prefix cache, which each update of the weights empties
    llm.generate(PROMPTS, SamplingParams(max_tokens=1), use_tqdm=False)
    prompts = [prompt for prompt in PROMPTS for _ in range(samples)]
    params = [
        SamplingParams(max_tokens=max_tokens - index % 4, logprobs=0, seed=10_000 * step + index)
        for index in range(len(prompts))
    ]
    return llm.generate(prompts, params, use_tqdm=False)


def reported(output: RequestOutput) -> list[float]:
    """The engine's log-probabilities of an output's tokens."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    return [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)]


def batch(outputs: Sequence[RequestOutput]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded ids and mask [B, T], which of them were sampled, and the engine's log-probabilities of those."""
    sequences = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    shape = len(sequences), max(map(len, sequences))
    ids, mask, chosen = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    engine = torch.zeros(shape)
    for row, (sequence, output) in enumerate(zip(sequences, outputs, strict=True)):
        own = slice(len(output.prompt_token_ids), len(sequence))
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
        chosen[row, own], engine[row, own] = 1, torch.tensor(reported(output))
    return ids, mask, chosen, engine


def train(llm: LLM, trainer: Trainer, optimizer: torch.optim.Optimizer, outputs: Sequence[RequestOutput]) -> Step:
    """One step along the gradient of REINFORCE (Williams 1992), with the mean of a prompt's rewards as its baseline."""
    ids, mask, chosen, engine = batch(outputs)
    logprobs = trainer(ids, mask).cpu() * chosen
    ratios = (logprobs.detach() - engine).exp()
    rewards = torch.tensor([reward(output.outputs[0].text) for output in outputs]).view(len(PROMPTS), -1)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).view(-1, 1) / (rewards.std() + 1e-6)
    optimizer.zero_grad()
    (-(advantages * ratios * logprobs).sum() / chosen.sum()).backward()
    torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
    optimizer.step()
    llm.update_weights(trainer.named_tensors())
    return Step(
        float(rewards.mean()),
        float((logprobs.detach() - engine).abs().max()),
        float((ratios - 1).abs().max()),
        int(chosen.sum()),
        sum(output.num_cached_tokens for output in outputs),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, print a table, and return the report."""
    began, steps = time.perf_counter(), []
    settings: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "max_model_len": 256}
    with LLM(args.model, **settings, multiprocessing=not args.in_process) as llm:
        trainer = Trainer(llm.model_folder, **settings)
        trainer.check_engine(llm.fingerprint_parts)
        optimizer = torch.optim.Adam(trainer.parameters(), lr=args.learning_rate)
        print(f"{'step':>4} {'reward':>8} {'difference':>10} {'ratio - 1':>10} {'tokens':>7} {'cached':>7}")
        for number in range(args.steps):
            step = train(llm, trainer, optimizer, sampled(llm, number, args.samples, args.max_tokens))
            steps.append(step)
            print(
                f"{number:4} {step.reward:8.4f} {step.largest_difference:10g} {step.largest_ratio_error:10g}"
                f" {step.num_tokens:7} {step.num_cached_tokens:7}"
            )
        parts = llm.fingerprint_parts
    few = max(1, len(steps) // 5)
    return {
        "benchmark": "rl_on_policy",
        "model": args.model,
        "dtype": parts["dtype"],
        "steps": len(steps),
        "reward_first": round(sum(step.reward for step in steps[:few]) / few, 4),
        "reward_last": round(sum(step.reward for step in steps[-few:]) / few, 4),
        "largest_difference": max(step.largest_difference for step in steps),
        "largest_ratio_error": max(step.largest_ratio_error for step in steps),
        "num_logprobs": sum(step.num_tokens for step in steps),
        "num_cached_tokens": sum(step.num_cached_tokens for step in steps),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": platform.machine(),
        "version": __version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="outputs of each prompt in a step")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--in-process", action="store_true", help="the engine runs in this process")
    report = run(parser.parse_args(arguments))
    print(json.dumps(report))
    is_equal = report["largest_difference"] == report["largest_ratio_error"] == 0
    return 0 if is_equal and report["reward_last"] > report["reward_first"] else 1


if __name__ == "__main__":
    sys.exit(main())
