"""The trainer: its log-probabilities are those of a worker, bit for bit; its gradients those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import Function, gradcheck
from torch.autograd.gradcheck import GradcheckError

from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.activation import Activation
from sempre.kernels.attention import ScoreParams
from sempre.workers.trainer import Trainer
from sempre.workers.trainer.formulas import (
    and_mul_backward,
    attention_backward,
    logprobs_backward,
    rms_norm_backward,
    rope_backward,
)

FAMILIES = [
    "llama", "llama-multi-head-tied", "llama-biases", "llama-llama3-rope", "llama-dynamic-rope", "llama-yarn-rope",
    "llama-head-dim", "mistral-window", "mistral3-multimodal", "qwen2", "qwen2-upper-window", "qwen3", "qwen3-biases",
    "gemma2", "gemma2-odd", "gemma3", "gemma3-odd", "gemma3-multimodal", "smollm3", "smollm3-odd", "granite",
    "granite-odd", "glm", "glm4", "glm4-odd", "phi3", "phi3-long", "phi3-part",
]  # fmt: skip
LENGTHS = (41, 3, 17, 1, 40)
SAMPLED = SamplingSpec(max_tokens=12, logprobs=0, prompt_logprobs=0)


def prompt_ids(length: int, salt: int) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def generated(worker: Any, prompt: Any) -> list[tuple[list[int], torch.Tensor]]:
    """Sequences of mixed lengths, computed together in chunks, with their log-probabilities from position 1 on."""
    prompts = [prompt(str(i), prompt_ids(n, i), SAMPLED, seed=i, chunks=(7, 16)) for i, n in enumerate(LENGTHS)]
    found = []
    finished = worker.run(*prompts)
    for each in prompts:
        result = finished[each.request_id]
        parts = [np.frombuffer(rows.logprobs, "<f4") for rows in [*result.prompt_logprobs, *result.logprobs]]
        assert result.errors == []
        found.append((each.token_ids + result.token_ids, torch.from_numpy(np.concatenate(parts))))
    return found


def in_one_batch(sequences: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded at the end or at the beginning."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), 7)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        own = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, own], mask[row, own] = torch.tensor(sequence), 1
    return ids, mask


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.product), "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_have_the_bits_of_the_engine(
    family: str, dtype: Any, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    folder = checkpoints(family).folder
    worker = serve(folder, dtype=dtype)
    trainer = Trainer(folder, dtype=dtype)
    trainer.check_engine(worker.loaded.fingerprint)
    reported = generated(worker, prompt)
    sequences = [sequence for sequence, _ in reported]
    padded = trainer(*in_one_batch(sequences))
    for row, (sequence, logprobs) in enumerate(reported):
        assert torch.equal(padded[row, 1 : len(sequence)], logprobs)
        assert not padded[row, 0]
        assert not padded[row, len(sequence) :].any()
    assert padded.requires_grad


def test_control(checkpoints: Any, serve: Any, prompt: Any) -> None:
    """An engine with ordinary matmuls reports other bits: the test above can fail."""
    folder = checkpoints("llama").folder
    reported = generated(serve(folder, numerics="control"), prompt)
    found = Trainer(folder)(*in_one_batch([sequence for sequence, _ in reported]))
    assert not all(torch.equal(found[row, 1 : len(ids)], logprobs) for row, (ids, logprobs) in enumerate(reported))


def test_leaves_have_the_bits_of_the_engine(checkpoints: Any, serve: Any, prompt: Any) -> None:
    folder = checkpoints("llama").folder
    reported = generated(serve(folder, numerics_profile="tree8"), prompt)
    batch = in_one_batch([sequence for sequence, _ in reported])
    found, other = Trainer(folder, numerics_profile="tree8")(*batch), Trainer(folder)(*batch)
    assert all(torch.equal(found[row, 1 : len(ids)], logprobs) for row, (ids, logprobs) in enumerate(reported))
    assert not torch.equal(found, other)


def test_padded_packed_and_alone(checkpoints: Any) -> None:
    trainer = Trainer(checkpoints("qwen3").folder)
    sequences = [prompt_ids(n, n) for n in LENGTHS]
    right, left = (trainer(*in_one_batch(sequences, left=side)) for side in (False, True))
    packed = trainer.packed(torch.tensor(list(chain(*sequences))), list(map(len, sequences)))
    alone = torch.cat([trainer(torch.tensor([sequence]))[0] for sequence in sequences])
    longest = max(LENGTHS)
    assert torch.equal(packed, alone)
    assert torch.equal(torch.cat([right[row, :n] for row, n in enumerate(LENGTHS)]), packed)
    assert torch.equal(torch.cat([left[row, longest - n :] for row, n in enumerate(LENGTHS)]), packed)


# the sequences are longer than the original context of a family, on which transformers' rope depends, or end in it
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama-dynamic-rope"])
def test_gradients_are_those_of_transformers(family: str, checkpoints: Any) -> None:
    checkpoint = checkpoints(family)
    trainer = Trainer(checkpoint.folder)
    sequences = [prompt_ids(n, n) for n in (70, 66)]
    weights = torch.linspace(-1, 2, 136)
    (trainer.packed(torch.tensor(list(chain(*sequences))), [70, 66]) * weights).sum().backward()
    checkpoint.model.double().zero_grad()
    try:
        for sequence, own in zip(sequences, weights.double().split([70, 66]), strict=True):
            ids = torch.tensor([sequence])
            logprobs = checkpoint.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            (logprobs * own[1:]).sum().backward()
        expected = expected_gradients(checkpoint.model, dict(trainer.named_parameters()))
    finally:
        checkpoint.model.zero_grad()
        checkpoint.model.float()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, parameter in trainer.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad.double() - expected[name]).norm()
        # that of a bias of keys is zero without rope
        assert float(error) < 1e-4 * max(float(expected[name].norm()), 1e-3 * largest), name


def expected_gradients(model: Any, wanted: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By the checkpoint's names."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        name: found[name] if name in found else found[name.replace("model.", "model.language_model.", 1)]
        for name in wanted
    }


def test_a_step_of_training_changes_the_bits_and_frozen_parameters_stay(checkpoints: Any) -> None:
    trainer = Trainer(checkpoints("llama").folder)
    frozen = trainer.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in trainer.named_tensors()}
    ids = torch.tensor([prompt_ids(20, 1)])
    first = trainer(ids).sum()
    optimizer = torch.optim.AdamW([p for p in trainer.parameters() if p.requires_grad], lr=1e-2)
    (-first).backward()
    assert frozen.grad is None
    optimizer.step()
    with torch.no_grad():
        second = trainer(ids).sum()
    assert float(second) > first.item()
    after = dict(trainer.named_tensors())
    assert [name for name in after if torch.equal(after[name], before[name])] == ["model.embed_tokens.weight"]
    assert not second.requires_grad


@pytest.mark.parametrize(
    ("family", "path"),
    [("qwen3-moe", "layers.0.mlp"), ("olmo2", "layers.0.self_attn"), ("gpt-oss", "self_attn"), ("qwen3.5", "layers")],
)
def test_families_without_gradients_are_refused_by_name(family: str, path: str, checkpoints: Any) -> None:
    with pytest.raises(ModelError, match=f"{path}.*has no gradient"):
        Trainer(checkpoints(family).folder)


def test_what_does_not_fit_is_refused(checkpoints: Any) -> None:
    trainer = Trainer(checkpoints("llama").folder)
    ids = torch.tensor([prompt_ids(5, 1)])
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: trainer(ids, torch.tensor([[1, 0, 1, 1, 1]])), "one run of ones per row, found several in row 0"),
        (lambda: trainer(ids, torch.ones(1, 4)), r"a mask of that shape, found \(1, 5\) and \(1, 4\)"),
        (lambda: trainer(ids + 320), r"ids in \[0, 320\), found"),
        (lambda: trainer.packed(ids[0], [2, 2]), "lengths that add up to N"),
        (lambda: trainer(torch.tensor([prompt_ids(257, 1)])), r"1 to 256 \(max_model_len\), found 257"),
        (lambda: trainer.check_engine({"dtype": "bfloat16"}), "dtype: the trainer has float32, the engine bfloat16"),
    ]
    for call, text in refused:
        with pytest.raises(ConfigError, match=text):
            call()


def checked(
    forward: Callable[..., torch.Tensor], backward: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor
) -> None:
    """gradcheck of a formula for the gradients of all inputs, float64."""

    class Checked(Function):
        @staticmethod
        def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*given)
            return forward(*given)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(grads[0], *ctx.saved_tensors)

    assert gradcheck(Checked.apply, [each.double().requires_grad_() for each in inputs])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=torch.float64)


def test_formula_of_norms() -> None:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight

    checked(forward, lambda grad, x, weight: rms_norm_backward(grad, x, weight, 0.1), random(3, 2, 8), random(8))


@pytest.mark.parametrize("kind", [Activation.SILU, Activation.GELU])
def test_formula_of_activations(kind: Activation) -> None:
    gelu = {"approximate": "tanh"}

    def forward(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        functional = torch.nn.functional
        return (functional.silu(gate) if kind is Activation.SILU else functional.gelu(gate, **gelu)) * up

    checked(forward, lambda grad, rows: (and_mul_backward(kind, grad, rows),), random(4, 12))


def test_formula_of_rope() -> None:
    angles = random(5, 4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        (first, second), cos, sin = x.chunk(2, dim=-1), angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    checked(forward, lambda grad, x: (rope_backward(grad, angles.cos(), angles.sin()),), random(5, 3, 8))


@pytest.mark.parametrize("params", [ScoreParams(0.3), ScoreParams(0.5, window=2), ScoreParams(0.5, soft_cap=1.5)])
def test_formula_of_attention(params: ScoreParams) -> None:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = params.scale * torch.einsum("ihd,jhd->hij", q, keys)
        if params.soft_cap is not None:
            scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
        ago = torch.arange(len(q))[:, None] - torch.arange(len(q))
        unseen = (ago < 0) | (ago >= (params.window or len(q)))
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values)

    checked(
        forward, lambda grad, q, k, v: attention_backward(grad, q, k, v, params), random(5, 4, 6), random(5, 2, 6),
        random(5, 2, 6) + 1,
    )  # fmt: skip


def test_formula_of_logprobs() -> None:
    targets = torch.tensor([2, 0, 6])

    def forward(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    checked(forward, lambda grad, logits: (logprobs_backward(grad, logits, targets),), random(3, 7))


def test_a_wrong_formula_is_noticed() -> None:
    with pytest.raises(GradcheckError, match="Jacobian"):
        checked(lambda x: x.square(), lambda grad, x: (grad * x,), random(4))
