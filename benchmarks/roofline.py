"""The least a step must read and compute, to compare with the time that its kernels took.

Bytes: every matrix once, of a mixture of experts those that are chosen, the keys and values of all contexts, and states
read and written. FLOPs: two per weight and token, four per query dimension and key, seven per number of a state and
token. Device figures are what a card reaches, not its
data sheet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from sempre.workers.models.config import ModelSpec
from sempre.workers.models.moe import MoeSpec
from sempre.workers.models.qwen3_5 import Qwen35Spec

REACHED_BYTES_PER_S = 4.0e12 if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name() else 3.05e12
REACHED_FLOPS = 750e12
ITEM = 2  # bytes, bfloat16

EXPERTS = ("_expert_linear",)
PRODUCTS = ("_linear", "nvjet", "cublas", "gemm", "cutlass")
ATTENTION = ("_attend", "_merge")
STATES = ("_conv", "_rule", "_norm_and_gate")


class Work(NamedTuple):
    """The work of one group of kernels in one step."""

    name: str
    bytes: float
    flops: float

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.bytes / REACHED_BYTES_PER_S, self.flops / REACHED_FLOPS)


def work_of(spec: ModelSpec, tokens: int, contexts: Iterable[int], logit_rows: int) -> list[Work]:
    """Matmuls and attention of a step of `tokens` tokens, evenly from requests whose numbers of keys are `contexts`:
    one token each, or whole prompts; `logit_rows` of them get logits."""
    keys = list(contexts)
    attending = [layer for layer, state in zip(spec.kv_layers, spec.layer_states, strict=True) if state is None]
    queries = [spec.num_heads * layer.head_dim for layer in attending]
    keys_and_values = [2 * layer.num_kv_heads * layer.head_dim for layer in spec.kv_layers]
    written = [size for size, layer in zip(keys_and_values, spec.kv_layers, strict=True) if layer.source is None]
    sparse = len(spec.sparse_layers) if isinstance(spec, MoeSpec) else 0
    head = spec.vocab_size * spec.hidden_size
    matrices = spec.hidden_size * (2 * sum(queries) + sum(written))
    if isinstance(spec, Qwen35Spec):
        # gates beside the queries; projections into and out of the layers with states
        into_and_out = spec.delta.channels + 2 * spec.delta.values + 2 * spec.delta.num_value_heads
        matrices += spec.hidden_size * (sum(queries) + len(spec.linear_layers) * into_and_out)
    matrices += (spec.num_layers - sparse) * 3 * spec.hidden_size * spec.intermediate_size
    products = Work("products", ITEM * (matrices + head), 2.0 * (matrices * tokens + head * logit_rows))
    per_request = tokens // len(keys)
    # a prompt's row sees half of it on average
    seen = sum(keys) * per_request / (1 if per_request == 1 else 2)
    attention = Work("attention", ITEM * sum(keys_and_values) * sum(keys), 4.0 * sum(queries) * seen)
    experts = [_experts(spec, sparse, tokens)] if isinstance(spec, MoeSpec) else []
    numbers = sum(state.num_heads * state.key_dim * state.value_dim for state in spec.layer_states if state is not None)
    states = [Work("states", 2 * 4 * numbers * len(keys), 7.0 * numbers * tokens)] if numbers else []
    return [products, attention, *states, *experts]


def _experts(spec: MoeSpec, layers: int, tokens: int) -> Work:
    """Routed experts' matmuls; the number that is read is the expected one of a router that prefers none."""
    expert = 3 * spec.hidden_size * spec.expert_size
    chosen = spec.num_experts * (1 - (1 - spec.experts_per_token / spec.num_experts) ** tokens)
    return Work("experts", ITEM * layers * expert * chosen, 2.0 * layers * expert * spec.experts_per_token * tokens)


def group_of(kernel: str) -> str:
    """Which group a kernel's time belongs to."""
    if kernel.startswith(ATTENTION):
        return "attention"
    if kernel.startswith(EXPERTS):
        return "experts"
    if kernel.startswith(STATES):
        return "states"
    return "products" if any(part in kernel for part in PRODUCTS) else "other"


def table(work: list[Work], kernel_us: dict[str, float], step_us: float) -> list[str]:
    """Lines: each group's time against its floor; everything else; and the step against the sum of floors."""
    times: dict[str, float] = {}
    for kernel, duration in kernel_us.items():
        times[group_of(kernel)] = times.get(group_of(kernel), 0.0) + duration
    lines = []
    for part in work:
        us = times.get(part.name, 0.0)
        if us:
            lines.append(
                f"    {part.name:10s} {us:9.1f} us, floor {part.floor_us:9.1f} us;"
                f" {part.bytes / us / 1e6:5.2f} TB/s of {part.bytes / 1e9:7.3f} GB,"
                f" {part.flops / us / 1e6:6.1f} TFLOP/s of {part.flops / 1e12:8.3f} TFLOP"
            )
    floor = sum(part.floor_us for part in work)
    lines.append(f"    {'other':10s} {times.get('other', 0.0):9.1f} us")
    lines.append(f"    {'step':10s} {step_us:9.1f} us, floor {floor:9.1f} us, {step_us / floor:5.2f} times")
    return lines
