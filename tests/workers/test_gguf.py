"""GGUF files in a worker: the bits of the same values in safetensors, for every family and type; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as dequantize_by_package
from gguf_files import widened, write_gguf_of
from worker_settings import worker_config

from sempre.engine.models.gguf_folder import write_gguf_folder
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.gguf_index import BLOCK_SIZES, GGUF_INDEX_FILE
from sempre.ipc.messages import SamplingSpec
from sempre.workers.gguf_source import open_gguf
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.gguf_blocks import UNPACK, dequantize

GREEDY = SamplingSpec(max_tokens=12, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
IDS = np.random.default_rng(5).integers(3, 320, 41).tolist()

# what the files of an architecture cannot say is changed in the checkpoint: a scale of queries, windows
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-multi-head-tied": {},
    "llama-head-dim": {},
    "llama-linear-rope": {},
    "llama-yarn-rope": {},
    "mistral-window": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3-moe": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    "gpt-oss": {},
    "phi3": {},
    "phi3-long": {},
    "phi3-part": {},
}


def equal_bits(kind: Any, other: Any) -> bool:
    return bool(((kind.view(np.uint32) == other.view(np.uint32)) | (np.isnan(kind) & np.isnan(other))).all())


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("kind", UNPACK)
def test_blocks_of_any_bytes_have_the_values_of_the_package(kind: str) -> None:
    raw = np.random.default_rng(len(kind)).integers(0, 256, (37, BLOCK_SIZES[kind].num_bytes * 9), dtype=np.uint8)
    expected = dequantize_by_package(raw, Kind[kind])
    assert equal_bits(dequantize(kind, torch.from_numpy(raw)).numpy(), expected)
    changed = raw.copy()
    changed[:, -1] ^= 8
    assert not equal_bits(dequantize(kind, torch.from_numpy(changed)).numpy(), expected)


def test_sizes_are_those_of_the_package() -> None:
    assert {name: (size.elements, size.num_bytes) for name, size in BLOCK_SIZES.items()} == {
        name: gguf.GGML_QUANT_SIZES[Kind[name]] for name in BLOCK_SIZES
    }
    assert UNPACK.keys() | {"F32", "F16", "BF16"} == BLOCK_SIZES.keys()


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Path]:
    """A folder that describes a GGUF file of a checkpoint."""

    def make(source: Path, name: str = "a", **options: Any) -> Path:
        write_gguf_of(source, tmp_path / f"{name}.gguf", **options)
        write_gguf_folder(tmp_path / f"{name}.gguf", tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def changed(checkpoints: Any, tmp_path: Path) -> Callable[[str], Path]:
    """The checkpoint of a family, with what its files cannot say changed."""

    def make(family: str) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(checkpoints(family).folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | FAMILIES[family]))
        return folder

    return make


def outputs(serve: Any, prompt: Any, folder: Path, **settings: Any) -> tuple[Any, Any]:
    found = serve(folder, **settings).run(prompt("a", IDS, GREEDY))["a"]
    assert found.errors == []
    return found.token_ids, b"".join(part.logprobs for part in [*found.prompt_logprobs, *found.logprobs])


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_of_the_checkpoint_in_safetensors(
    family: str, changed: Any, described: Any, serve: Any, prompt: Any
) -> None:
    source = changed(family)
    expected = outputs(serve, prompt, source, dtype="float32")
    assert outputs(serve, prompt, described(source), dtype="float32") == expected


def test_a_head_left_in_the_order_of_the_file_gives_other_bits(
    changed: Any, described: Any, serve: Any, prompt: Any
) -> None:
    """The control of the test above."""
    source = changed("llama")
    folder = described(source)
    index = json.loads((folder / GGUF_INDEX_FILE).read_text())
    index["tensors"]["model.layers.1.self_attn.k_proj.weight"]["form"] = "plain"
    (folder / GGUF_INDEX_FILE).write_text(json.dumps(index))
    expected = outputs(serve, prompt, source, dtype="float32")
    assert outputs(serve, prompt, folder, dtype="float32") != expected


def test_waves_of_llama_3_come_from_their_factors(
    checkpoints: Any, described: Any, serve: Any, dense: Any, prompt: Any
) -> None:
    checkpoint = checkpoints("llama-llama3-rope")
    found = serve(described(checkpoint.folder), dtype="float32").run(prompt("a", IDS, GREEDY))["a"]
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([IDS + found.token_ids])).logits[0, :-1].double()
    rows = torch.cat([dense(found.prompt_logprobs, 320), dense(found.logprobs, 320)]).double()
    expected = logits.log_softmax(-1)
    assert float((rows - expected).norm() / expected.norm()) < 1e-5
    assert found.token_ids == logits[len(IDS) - 1 :].argmax(-1).tolist()


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are made of whole blocks of every type."""
    import transformers

    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "Q6_K", "attn_k": "Q5_K"}


@pytest.mark.parametrize("kind", [*UNPACK, "F16", "BF16", "mixed"])
def test_every_type_has_the_bits_of_its_values_in_floats(
    kind: str, wide_checkpoint: Path, described: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    def kind_of(name: str) -> Kind:
        return Kind[MIXED.get(name.split(".")[-2], "Q4_K") if kind == "mixed" else kind]

    folder = described(wide_checkpoint, kind_of=kind_of)
    widened(tmp_path / "a.gguf", tmp_path / "b.gguf")
    write_gguf_folder(tmp_path / "b.gguf", tmp_path / "b")
    with open_gguf(folder) as narrow, open_gguf(tmp_path / "b") as wide:
        for name in wide.names():
            assert torch.equal(narrow.read(name).float(), wide.read(name)), name
            assert narrow.digest(name, torch.empty(0)) != wide.digest(name, torch.empty(0)) or "norm" in name
    expected = outputs(serve, prompt, tmp_path / "b", dtype="float32")
    assert outputs(serve, prompt, folder, dtype="float32") == expected


def load(folder: Path) -> None:
    load_model(worker_config(folder), load_spec(folder), INVARIANT)


def test_a_scale_that_is_not_finite_is_refused(wide_checkpoint: Path, described: Any, tmp_path: Path) -> None:
    folder = described(wide_checkpoint, kind_of=lambda name: Kind.Q8_0)
    stored = json.loads((folder / GGUF_INDEX_FILE).read_text())["tensors"]["model.layers.1.mlp.up_proj.weight"]
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    at = stored["sources"][0]["offset"]
    data[at : at + 2] = np.float16("nan").tobytes()
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(TensorMismatch, match=r"a\.gguf: .*expected finite values in blk\.1\.ffn_up\.weight \(Q8_0\)"):
        load(folder)


def test_a_file_that_changed_is_refused(changed: Any, described: Any, tmp_path: Path) -> None:
    folder = described(changed("llama"))
    with open(tmp_path / "a.gguf", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"a\.gguf: expected \d+ bytes, as when it was opened first, found \d+"):
        load(folder)
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(ModelError, match=r"a\.gguf: file not found"):
        load(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda stored: stored.update(offset=2**62), "expected its end within"),
        (lambda stored: stored.update(shape=[2**40, 2**40]), "expected its end within"),
        (lambda stored: stored.update(type="Q9"), "a known type and file"),
        (lambda stored: stored.update(file=3), "a known type and file"),
        (lambda stored: stored.update(type="Q4_K", shape=[320, 64]), "whole blocks"),
        (lambda stored: stored.update(shape="x"), "shape"),
    ],
)
def test_an_index_that_lies_is_refused(edit: Any, named: str, changed: Any, described: Any) -> None:
    folder = described(changed("llama"))
    path = folder / GGUF_INDEX_FILE
    index = json.loads(path.read_text())
    edit(index["tensors"]["model.embed_tokens.weight"]["sources"][0])
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=named):
        load(folder)


def test_tensors_of_another_shape_are_named_with_their_file(changed: Any, described: Any) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop("llama.feed_forward_length")
        writer.add_feed_forward_length(128)

    folder = described(changed("llama"), change=change)
    with pytest.raises(TensorMismatch, match=r"(?s)a\.gguf: .*gate_proj\.weight': expected shape \[128, 64\], found"):
        load(folder)
