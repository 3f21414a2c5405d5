"""Models in the CPU's integer profile: which matrices are integers, bits among others, accuracy, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf_of
from ranks import Ranks
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.engine.models.gguf_folder import write_gguf_folder
from sempre.ipc.errors import ConfigError, TensorMismatch
from sempre.ipc.gguf_index import BLOCK_SIZES, GGUF_INDEX_FILE, read_gguf_index
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.integers import GroupedIntegers, IntegerScheme, IntegerWeight
from sempre.workers.gguf_source import open_gguf
from sempre.workers.layers.linear_kernel import CONTROL, INVARIANT
from sempre.workers.loading import ON_CPU, Loaded, live_digest, load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.gguf_blocks import CODES, MINIMA, SCALES, UNPACK, integer_forms
from sempre.workers.quantization.integers import quantize_blocks
from sempre.workers.self_test import check_linears, require_equal

GREEDY = SamplingSpec(max_tokens=10, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
IDS = np.random.default_rng(5).integers(3, 320, 41).tolist()
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q2_K", "token_embd": "Q8_0", "output": "Q6_K", "attn_k": "Q8_0"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are made of whole blocks of every type."""
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def described(checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder that describes a GGUF file whose matrices are of a type."""

    def make(kind: str) -> Path:
        def kind_of(name: str) -> Kind:
            return Kind[MIXED.get(name.split(".")[-2], "Q4_K") if kind == "mixed" else kind]

        folder = tmp_path / kind
        if not folder.exists():
            write_gguf_of(checkpoint, tmp_path / f"{kind}.gguf", kind_of)
            write_gguf_folder(tmp_path / f"{kind}.gguf", folder)
        return folder

    return make


def load(folder: Path, kernel: Any = INVARIANT, **settings: Any) -> Loaded:
    return load_model(worker_config(folder, **settings), load_spec(folder), kernel)


def bits(finished: Any) -> tuple[list[int], bytes]:
    assert finished.errors == []
    return finished.token_ids, b"".join(part.logprobs for part in [*finished.prompt_logprobs, *finished.logprobs])


def runs(serve: Any, prompt: Any, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A request alone, and in pieces among others."""
    others = [prompt(f"{i}", IDS[i : 9 * i + 2], GREEDY, chunks=(1 + 3 * i,)) for i in range(4)]
    cut = prompt("wanted", IDS, GREEDY, chunks=(7, 1, 16))
    alone = serve(folder, **settings).run(prompt("wanted", IDS, GREEDY))["wanted"]
    return bits(alone), bits(serve(folder, **settings).run(*others[:2], cut, *others[2:])["wanted"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "mixed", "int8", "int4"])
def test_a_row_keeps_its_bits_among_others(
    kind: str, checkpoint: Path, described: Any, serve: Any, prompt: Any
) -> None:
    folder, setting = (checkpoint, kind) if kind.startswith("int") else (described(kind), "integer")
    alone, among_others = runs(serve, prompt, folder, quantization=setting)
    assert among_others == alone
    plain, _ = runs(serve, prompt, folder)
    assert plain != alone


@pytest.mark.parametrize(
    "kind", ["mixed", *(pytest.param(kind, marks=pytest.mark.product) for kind in ("Q8_0", "Q4_0", "Q4_K", "int4"))]
)
def test_ranks_give_the_bits_of_one_worker(kind: str, checkpoint: Path, described: Any) -> None:
    folder, setting = (checkpoint, kind) if kind.startswith("int") else (described(kind), "integer")
    one, two, four = (Ranks(folder, size, quantization=setting) for size in (1, 2, 4))
    [expected] = one.logits(IDS)
    weights = {path: module.weight for path, module in two.loaded[0].model.linears()}
    assert {weights[f"model.layers.1.{name}"].leaves for name in ("self_attn.o_proj", "mlp.down_proj")} == {4, 2}
    for ranks in (two, four):
        for rank, found in enumerate(ranks.logits(IDS, (1, 18))):
            assert torch.equal(found, expected), f"rank {rank} of {ranks.size}"
    [in_one_chain] = Ranks(folder, 1, quantization=setting, profile="single").logits(IDS)
    assert not torch.equal(in_one_chain, expected)  # control: the order of sums shows


@pytest.mark.parametrize("setting", ["int8", "integer"])
def test_control(setting: str, checkpoint: Path, described: Any, serve: Any, prompt: Any) -> None:
    """Ordinary matmuls of the same matrices give a row other bits among others."""
    folder = described("Q4_0") if setting == "integer" else checkpoint
    alone, among_others = runs(serve, prompt, folder, quantization=setting, numerics="control")
    assert among_others != alone


@pytest.mark.parametrize("kind", UNPACK)
def test_integers_of_a_file_stand_for_its_values(kind: str, described: Any) -> None:
    folder = described(kind)
    with open_gguf(folder) as plain:
        modules = {name.removesuffix(".weight") for name in plain.names() if "proj" in name}
        with open_gguf(folder, modules) as source:
            for module in modules:
                parts = {suffix: source.read(module + suffix) for suffix in (CODES, SCALES)}
                minima = source.read(module + MINIMA) if module + MINIMA in source.names() else None
                matrix = GroupedIntegers(parts[CODES], parts[SCALES], minima)
                assert torch.equal(matrix.values(), plain.read(module + ".weight")), module
                for suffix, tensor in parts.items():
                    assert source.shape(module + suffix) == tuple(tensor.shape)
                    assert module + ".weight" not in source.names()


def test_which_matrices_are_integers(described: Any, checkpoint: Path) -> None:
    model = load(described("mixed"), quantization="integer").model
    weights = {path: linear.weight for path, linear in model.linears()}
    assert all(isinstance(weight, IntegerWeight) for weight in weights.values())
    assert [part.layout.bits for part in weights["model.layers.0.self_attn.qkv_proj"].parts] == [4, 8, 8]
    assert weights["model.layers.1.mlp.down_proj"].parts[0].layout.has_minimum
    online = {path: linear.weight for path, linear in load(checkpoint, quantization="int4").model.linears()}
    assert not isinstance(online.pop("lm_head"), IntegerWeight)
    assert all(weight.scheme is IntegerScheme.INT4 for weight in online.values())
    assert all(part.layout.bits == 4 for weight in online.values() for part in weight.parts)


def test_memory_and_digests(described: Any, checkpoint: Path) -> None:
    integers, floats = (load(described("Q4_0"), quantization=setting) for setting in ("integer", None))
    assert integers.facts.digest == load(described("Q4_0"), quantization="integer").facts.digest
    assert live_digest(integers.model) == live_digest(load(described("Q4_0"), quantization="integer").model)

    def down_bytes(loaded: Loaded) -> int:
        return next(linear.weight.nbytes for path, linear in loaded.model.linears() if path.endswith("down_proj"))

    assert down_bytes(integers) == 256 * 512 // 2 + 256 * 512 // 32 * 4
    assert down_bytes(floats) == 256 * 512 * 2
    eight = load(checkpoint, quantization="int8")
    assert down_bytes(eight) == 256 * 512 + 256 * 512 // 32 * 4
    assert live_digest(eight.model) != live_digest(load(checkpoint, quantization="int4").model)


def test_blocks_are_quantised_to_the_nearest() -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    weight[2, :32] = 0
    weight[3, :32] = 2.0**-149
    for scheme, most in ((IntegerScheme.INT8, 127), (IntegerScheme.INT4, 7)):
        matrix = quantize_blocks(weight, scheme)
        assert int(matrix.codes.abs().max()) == most
        error = (matrix.values() - weight).abs().view(7, 3, 32)
        assert bool((error <= matrix.scale[..., None] * 0.5001 + 2.0**-149).all())
        assert int(matrix.codes[2, :32].abs().max()) == 0


def test_log_probabilities_are_near_those_of_floats(
    checkpoint: Path, described: Any, serve: Any, dense: Any, prompt: Any
) -> None:
    def rows(folder: Path, **settings: Any) -> torch.Tensor:
        found = serve(folder, **settings).run(prompt("a", IDS, GREEDY))["a"]
        return dense(found.prompt_logprobs, 320).double()

    stored = described("Q8_0")
    for folder, setting, most in ((checkpoint, "int8", 0.01), (checkpoint, "int4", 0.15), (stored, "integer", 0.01)):
        plain = rows(folder, dtype="float32")
        error = (rows(folder, dtype="float32", quantization=setting) - plain).norm() / plain.norm()
        assert 0 < float(error) < most, setting


def test_the_self_test_compares_every_layout(described: Any) -> None:
    model = load(described("mixed"), quantization="integer").model
    found = list(check_linears(model, torch.bfloat16, 64))
    require_equal(found)
    # fused queries, keys and values; the output; gates; the way down; the head
    assert len({comparison.operation for comparison in found}) == 5
    control = load(described("mixed"), CONTROL, quantization="integer").model
    assert any(int(comparison.different) for comparison in check_linears(control, torch.bfloat16, 64))


def test_inputs_that_are_no_whole_blocks_are_named(checkpoints: Any) -> None:
    folder = checkpoints("qwen3-moe").folder
    with pytest.raises(TensorMismatch, match=r"down_proj\.weight': expected a multiple of 32 inputs .*, found 48"):
        load(folder, quantization="int8")


def test_experts_of_a_file(tmp_path: Path, serve: Any, prompt: Any) -> None:
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        norm_topk_prob=True, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    write_gguf_of(tmp_path / "source", tmp_path / "a.gguf", lambda name: Kind.F32 if "inp" in name else Kind.Q4_1)
    write_gguf_folder(tmp_path / "a.gguf", tmp_path / "a")
    alone, among_others = runs(serve, prompt, tmp_path / "a", quantization="integer")
    assert among_others == alone
    for setting in ("int8", "int4"):
        alone, among_others = runs(serve, prompt, tmp_path / "source", quantization=setting)
        assert among_others == alone


def test_the_fingerprint_names_the_profile(checkpoint: Path, described: Any, serve: Any) -> None:
    folder = described("Q4_0")
    assert serve(folder, quantization="integer").loaded.fingerprint["quantization"] == "integer-1"
    assert serve(checkpoint, quantization="int4").loaded.fingerprint["quantization"] == "int4-1"


def test_what_integers_do_not_do_is_refused(checkpoint: Path, described: Any) -> None:
    with pytest.raises(ConfigError, match=r"'integer': expected a GGUF file with matrices in blocks, or a .*wide"):
        load(checkpoint, quantization="integer")
    with pytest.raises(ConfigError, match=r"'integer': expected load_format 'auto', found 'dummy'"):
        load(described("Q8_0"), quantization="integer", load_format="dummy")
    config = worker_config(checkpoint, quantization="int4")
    elsewhere = ON_CPU.__class__(torch.device("cuda"), ON_CPU.upload, 1)
    with pytest.raises(ConfigError, match=r"'int4': expected device 'cpu', found 'cuda'"):
        load_model(config, load_spec(checkpoint), INVARIANT, elsewhere)


def test_values_that_are_not_finite_are_named(checkpoint: Path, described: Any, tmp_path: Path) -> None:
    folder = described("Q8_0")
    index = json.loads((folder / GGUF_INDEX_FILE).read_text())
    at = index["tensors"]["model.layers.1.mlp.up_proj.weight"]["sources"][0]["offset"]
    data = bytearray((tmp_path / "Q8_0.gguf").read_bytes())
    data[at : at + 2] = np.float16("inf").tobytes()
    (tmp_path / "Q8_0.gguf").write_bytes(data)
    with pytest.raises(TensorMismatch, match=r"up_proj\.code_scales': expected finite numbers in the file, found 1"):
        load(folder, quantization="integer")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(TensorMismatch, match=r"up_proj\.weight': expected finite values, found 1 that are not"):
        load(tmp_path / "nan", quantization="int8")


def test_forms_are_those_of_the_blocks(described: Any) -> None:
    for kind, unpack in UNPACK.items():
        blocks = unpack(torch.zeros((1, BLOCK_SIZES[kind].num_bytes), dtype=torch.uint8))
        form = integer_forms(read_gguf_index(described(kind)))["model.layers.0.mlp.up_proj"]
        assert form == (blocks.codes.shape[1] // blocks.scale.shape[1], blocks.minimum is not None), kind
