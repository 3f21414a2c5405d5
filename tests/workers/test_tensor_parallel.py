"""Ranks that share a model give the bits of one worker, for every family and size that divides it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_spec, save_adapter
from family_names import NAMES
from ranks import Ranks, on_all_ranks
from safetensors.torch import load_file, save_file

from sempre.ipc.adapter_files import WEIGHTS_FILE
from sempre.ipc.errors import ConfigError, EngineUnhealthy, InvarianceError, StartupError, TensorMismatch
from sempre.ipc.messages import AdapterSpec
from sempre.kernels.linear import CpuLinearWeight, linear
from sempre.workers.adapters.peft import adaptable_linears, read_adapter
from sempre.workers.cpu.exchange import SharedMemoryExchange
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, parameters
from sempre.workers.models.registry import build_model, load_spec
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.self_test import check_linears, require_equal

TOKENS = [(7919 * i + 11) % 320 for i in range(45)]
CUTS = (1, 18, 44)
# 7 query heads for each key head, and one key head for all
GQA_7_TO_1 = {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 16}
ONE_KEY_HEAD = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}

Folder = Callable[..., Path]


@pytest.fixture
def folder(checkpoints: Any, tmp_path: Path) -> Folder:
    """A checkpoint like a named one, whose feed-forward branches have at least 8 leaves, and with `changes`."""

    def make(name: str, **changes: object) -> Path:
        config = json.loads((checkpoints(name).folder / "config.json").read_text())
        for section in (config, config.get("text_config", {})):
            for field, value in section.items():
                if field.endswith("intermediate_size") and isinstance(value, int):
                    section[field] = -(-value // 128) * 128
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        _save_weights(tmp_path)
        return tmp_path

    return make


def _save_weights(folder: Path) -> None:
    """Random ones, biases and norms too; none of a part of a larger model, whose weights will be dummies."""
    model = build_model(Build(INVARIANT, NotQuantized()), load_spec(folder))
    if model.part is not None:
        return
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.initial == "normal" else 0.3)
        + (parameter.initial == "ones")
        for name, parameter in parameters(model).items()
    }
    save_file(tensors, folder / "model.safetensors")


def of(folder: Path, size: int, **settings: Any) -> Ranks:
    """The model on so many ranks."""
    stored = (folder / "model.safetensors").exists()
    return Ranks(folder, size, load_format="auto" if stored else "dummy", **settings)


def expected_of(folder: Path, **settings: Any) -> torch.Tensor:
    """What one worker computes, in one piece."""
    [logits] = of(folder, 1, **settings).logits(TOKENS)
    assert logits.isfinite().all()
    return logits


def check(ranks: Ranks, expected: torch.Tensor, cuts: tuple[int, ...] = CUTS) -> None:
    for rank, found in enumerate(ranks.logits(TOKENS, cuts)):
        assert torch.equal(found, expected), f"rank {rank} of {ranks.size}"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_on_two_ranks(name: str, folder: Folder) -> None:
    checkpoint = folder(name)
    one, two = of(checkpoint, 1), of(checkpoint, 2)
    [expected] = one.logits(TOKENS)
    assert expected.isfinite().all()
    check(two, expected)
    assert {loaded.facts.digest for loaded in two.loaded} == {one.loaded[0].facts.digest}


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("llama", 4, {}),
        ("llama-biases", 4, {}),
        ("llama", 8, ONE_KEY_HEAD),
        ("qwen3", 4, GQA_7_TO_1),
        ("qwen3", 2, {**GQA_7_TO_1, "num_attention_heads": 14, "num_key_value_heads": 2}),
        ("gemma2", 4, {}),
        ("gemma2", 4, ONE_KEY_HEAD),
        ("qwen3-moe", 4, {}),
        ("qwen3-moe-odd", 4, {}),
        ("gpt-oss", 4, {}),
        # shares of the vocabulary of other sizes
        ("qwen2", 4, {"vocab_size": 323}),
    ],
)
def test_more_ranks_and_shapes(name: str, size: int, changes: dict[str, object], folder: Folder) -> None:
    checkpoint = folder(name, **changes)
    check(of(checkpoint, size), expected_of(checkpoint))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-moe"])
@pytest.mark.parametrize("quantization", ["fp8", "fp8_weight_only", "int8"])
def test_quantised(name: str, quantization: str, folder: Folder) -> None:
    checkpoint = folder(name)
    expected = expected_of(checkpoint, quantization=quantization)
    check(of(checkpoint, 2, quantization=quantization), expected)
    # blocks of 32 are never cut, and the sum over the heads has 64 inputs
    if quantization != "int8":
        check(of(checkpoint, 4, quantization=quantization), expected)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3-moe", marks=pytest.mark.product)])
def test_fp8_kv_cache(name: str, folder: Folder) -> None:
    """A head's scale is its own, so it does not matter which rank has the head."""
    checkpoint = folder(name)
    expected = expected_of(checkpoint, kv_cache_dtype="fp8")
    check(of(checkpoint, 2, kv_cache_dtype="fp8"), expected)
    assert not torch.equal(expected, expected_of(checkpoint))


def adapter_for(checkpoint: Path, folder: Path) -> AdapterSpec:
    """An adapter of all modules that may have one."""
    model = build_model(Build(INVARIANT, NotQuantized()), load_spec(checkpoint))
    modules = {
        part.module: (part.num_stored, linear.stored_inputs)
        for path, linear in adaptable_linears(model)
        for part in linear.adapter_parts(path)
    }
    return adapter_spec(save_adapter(folder, modules, rank=9))


ADAPTED = ["qwen2", "qwen3-biases", "glm", "phi3", "gemma2", "gemma4", "qwen2-moe", "olmo2", "gpt-oss"]


@pytest.mark.parametrize("name", ["llama", "qwen3.5", *(pytest.param(n, marks=pytest.mark.product) for n in ADAPTED)])
def test_adapters(name: str, folder: Folder, tmp_path: Path) -> None:
    """Every rank has A whole, and B's rows of its own outputs; inputs that ranks share are brought together."""
    checkpoint = folder(name)
    settings = {"adapter": adapter_for(checkpoint, tmp_path / "adapter"), "enable_lora": True}
    expected = expected_of(checkpoint, **settings)
    ranks = of(checkpoint, 2, **settings)
    check(ranks, expected)
    # as many rows at a time as the memory has room for
    for exchange in ranks.exchanges:
        exchange.most_rows = lambda width: 7  # type: ignore[method-assign]
    check(ranks, expected)
    assert not torch.equal(expected, expected_of(checkpoint))
    if not name.startswith("gemma4"):
        check(of(checkpoint, 1, num_stages=2, **settings), expected)
        check(of(checkpoint, 2, num_stages=2, **settings), expected)


def test_what_is_wrong_with_an_adapter_is_found_by_every_stage(folder: Folder, tmp_path: Path) -> None:
    """Also in the tensors of another stage's layers."""
    checkpoint = folder("llama")
    spec = adapter_for(checkpoint, tmp_path / "adapter")
    weights = Path(spec.path) / WEIGHTS_FILE
    tensors = load_file(weights)
    last = max(name for name in tensors if "layers.2." in name)
    stages = of(checkpoint, 2, num_stages=2, enable_lora=True)
    save_file({**tensors, last: tensors[last][:, :-1].contiguous()}, weights)
    for model, _ in stages.loaded:
        with pytest.raises(TensorMismatch, match=re.escape(repr(last))):
            read_adapter(weights.parent, model, 16)
    save_file({name: tensor for name, tensor in tensors.items() if name != last}, weights)
    for model, _ in stages.loaded:
        with pytest.raises(TensorMismatch, match="found nothing"):
            read_adapter(weights.parent, model, 16)


def test_sixteen_bit_weights(folder: Folder) -> None:
    checkpoint = folder("qwen3")
    check(of(checkpoint, 4, dtype="bfloat16"), expected_of(checkpoint, dtype="bfloat16"))


def test_ranks_hold_parts(folder: Folder) -> None:
    checkpoint = folder("qwen3-moe", tie_word_embeddings=True)
    [whole], *_ = (of(checkpoint, size).loaded for size in (1,))
    parts = of(checkpoint, 2)
    sizes = [loaded.facts.nbytes for loaded in parts.loaded]
    # norms and routers are on every rank
    assert max(sizes) < 0.53 * whole.facts.nbytes
    assert [layer.num_kv_heads for layer in parts.loaded[0].model.kv_layers] == [1, 1, 1]
    assert parts.caches[0].nbytes * 2 == of(checkpoint, 1).caches[0].nbytes


def test_control_the_profile_of_one_chain_has_other_bits(folder: Folder) -> None:
    checkpoint = folder("llama")
    assert not torch.equal(expected_of(checkpoint), expected_of(checkpoint, profile="single"))


def test_control_partial_sums_in_another_order_and_without_one(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder("llama")
    expected = expected_of(checkpoint)
    from sempre.workers.layers import row_parallel

    add = row_parallel.sum_partials
    for damage in ([0, 2, 1, 3], [0, 1, 2, 2]):
        monkeypatch.setattr(row_parallel, "sum_partials", lambda p, w, out, d=damage: add(p[d].contiguous(), w, out))
        for found in of(checkpoint, 4).logits(TOKENS):
            assert not torch.equal(found, expected)


def test_control_another_bit_in_a_weight_of_one_rank(folder: Folder) -> None:
    checkpoint = folder("llama")
    ranks, expected = of(checkpoint, 2), expected_of(checkpoint)
    weight = ranks.loaded[1].model.model.layers[1].mlp.down_proj.weight
    weight.panels.view(torch.int32)[0, 3, 5] ^= 1 << 20
    for found in ranks.logits(TOKENS):
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "size", "changes", "message"),
    [
        ("llama", 3, {}, r"rank 0: expected a divisor of num_attention_heads=4, found 3\."),
        (
            "qwen3",
            4,
            {**GQA_7_TO_1, "num_attention_heads": 14, "num_key_value_heads": 2},
            r"rank 0: expected a divisor of num_attention_heads=14, found 4\.",
        ),
        (
            "qwen3",
            2,
            {**GQA_7_TO_1, "num_attention_heads": 12, "num_key_value_heads": 3},
            r"rank 0: expected a divisor or a multiple of num_key_value_heads=3, found 2\.",
        ),
        ("llama", 4, {"intermediate_size": 96}, r"expected a divisor of the 2 leaves in which down_proj sums its 96"),
        (
            "qwen3-moe",
            8,
            {**ONE_KEY_HEAD, "num_experts": 6, "num_local_experts": 6},
            r"rank 0: expected at most the 6 experts",
        ),
    ],
)
def test_sizes_that_do_not_divide_the_model(
    name: str, size: int, changes: dict[str, object], message: str, folder: Folder
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        of(folder(name, **changes), size)
    assert (refused.value.parameter, refused.value.value) == ("tensor_parallel_size", size)


# The exchange itself


def _descriptor() -> int:
    return os.memfd_create("exchange")


def test_rows_are_those_that_the_others_wrote() -> None:
    """Many exchanges of many sizes, with ranks that are late in turn: nobody reads a row of before or after."""
    size, descriptor = 3, _descriptor()

    def run(rank: int) -> int:
        exchange = SharedMemoryExchange(descriptor, rank, size)
        wrong = 0
        for number in range(400):
            rows, width = 1 + number % 5, 1 + number % 7
            slots = exchange.slots(rows, width)
            if number % 100 == 17 * rank:
                time.sleep(0.03)
            slots[rank] = 1000 * number + rank
            exchange.wait()
            if number % 100 == 53 + rank:
                time.sleep(0.03)
            expected = 1000.0 * number + torch.arange(size)[:, None, None]
            wrong += int((slots != expected).sum())
        return wrong

    assert on_all_ranks(size, run) == [0] * size
    os.close(descriptor)


def test_a_rank_that_does_not_come_is_named() -> None:
    descriptor = _descriptor()
    exchange = SharedMemoryExchange(descriptor, 0, 2, patience_s=0.3)
    exchange.slots(1, 1)
    with pytest.raises(EngineUnhealthy, match=r"rank 0: exchange 1: expected rank 1 within 0\.3 s") as missing:
        exchange.wait()
    assert missing.value.rank == 1
    os.close(descriptor)


def test_a_rank_joins_once() -> None:
    descriptor = _descriptor()
    SharedMemoryExchange(descriptor, 1, 2)
    with pytest.raises(StartupError, match="rank 1: expected one worker of each rank"):
        SharedMemoryExchange(descriptor, 1, 2)
    os.close(descriptor)


def test_wide_rows_are_exchanged_in_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedMemoryExchange, "most_rows", lambda self, width: max(1, 1500 // width))
    checkpoint = folder("qwen3-moe")
    check(of(checkpoint, 2), expected_of(checkpoint))


def test_an_unknown_token_is_refused_by_every_rank(folder: Folder) -> None:
    ranks = of(folder("llama"), 2)
    for _ in range(2):
        with pytest.raises(IndexError, match="outside a table of 320 rows"):
            ranks.logits([5, 320])


# The self-test


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_the_self_test_notices_another_order_of_leaves(quantization: str | None, folder: Folder) -> None:
    model, facts = of(folder("llama"), 1, quantization=quantization).loaded[0]
    passed = require_equal(check_linears(model, facts.matrix_dtype, 64))
    assert passed["linear"] > 0

    def swapped(x: torch.Tensor, weight: CpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
        """The sums of the second leaf and the third are exchanged."""
        order = torch.arange(weight.leaves)
        order[1:3] = order[1:3].flip(0) if weight.leaves > 2 else order[1:3]
        parts, panels = x.chunk(weight.leaves, 1), weight.panels.view(torch.uint8).chunk(weight.leaves, 1)
        panels = torch.cat([panels[leaf] for leaf in order], 1).view(weight.panels.dtype)
        return linear(torch.cat([parts[leaf] for leaf in order], 1), replace(weight, panels=panels), out)

    for _, module in model.linears():
        module.kernel = INVARIANT._replace(linear=swapped)
    with pytest.raises(InvarianceError, match=r"self-test: linear .*: \d leaves against each by itself: expected the"):
        require_equal(check_linears(model, facts.matrix_dtype, 64))
