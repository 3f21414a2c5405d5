"""One llama-architecture GGUF file → a Hugging Face folder with bfloat16 safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from sempre.engine.models.gguf_check import check_gguf
from sempre.engine.models.gguf_metadata import GGUFMetadata
from sempre.engine.models.safetensors_writer import write_bfloat16
from sempre.ipc.errors import ModelError, TensorMismatch

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

CONVERTER_REVISION = 1
"""Increased whenever the same GGUF would give different files, so that older conversions are redone."""

_MOST_WIDTH = 2**20
_MOST_HEADS = 4096
_MOST_POSITIONS = 2**27

# Rows are dequantised in blocks of about this many values (32 MiB of float32).
_VALUES_PER_BLOCK = 1 << 23


@dataclass(frozen=True, slots=True)
class _LlamaShape:
    """The sizes that decide tensor shapes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor to write: its shape, the GGUF tensor it comes from, and the heads whose rows are permuted (or 0)."""

    source: str
    shape: tuple[int, ...]
    permuted_heads: int = 0


def convert_gguf(gguf_path: Path, folder: Path, *, progress: bool = True) -> None:
    """Convert `gguf_path` into the new folder `folder`: weights, config.json, generation config and tokenizer.

    Weights of any type the gguf library can dequantise become bfloat16. The published llama-style models are
    bfloat16, and a quantised value carries fewer significant bits than bfloat16 keeps of it, so float32 would
    double the size for no better model.

    Raises ModelError (TensorMismatch for a tensor) naming the invalid field or tensor; anything unknown to
    the converter is an error.
    """
    from gguf import GGUFReader

    from sempre.engine.models.gguf_tokenizer import special_token_ids, write_tokenizer

    check_gguf(gguf_path)
    # Left to the reader: tensor types, duplicate names, invalid UTF-8.
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{gguf_path} cannot be read as GGUF: {error}") from error
    metadata = GGUFMetadata(reader)
    metadata.expect("general.architecture", "llama", default=None)
    folder.mkdir(parents=True)

    shape = _read_shape(metadata, len(reader.tensors))
    context_length = metadata.count("llama.context_length", _MOST_POSITIONS)
    vocab_size = write_tokenizer(metadata, folder, context_length=context_length)
    config = _config(metadata, shape, context_length, vocab_size)
    special_ids = special_token_ids(metadata)
    metadata.refuse_unread()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    targets = _targets(shape, vocab_size, tied="output.weight" not in tensors)
    _check_tensors(tensors, targets)
    special_ids.pop("unk_token_id", None)  # only the tokenizer uses it
    config |= {"tie_word_embeddings": "lm_head.weight" not in targets, **special_ids}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)
    _write_weights(reader, targets, folder / "model.safetensors", progress)


def _read_shape(metadata: GGUFMetadata, num_tensors: int) -> _LlamaShape:
    hidden_size = metadata.count("llama.embedding_length", _MOST_WIDTH)
    num_heads = metadata.count("llama.attention.head_count", _MOST_HEADS)
    num_kv_heads = metadata.count("llama.attention.head_count_kv", _MOST_HEADS, default=num_heads)
    head_dim = metadata.count("llama.attention.key_length", _MOST_WIDTH, default=hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"GGUF field 'llama.attention.key_length': expected an even number, found {head_dim}.")
    metadata.expect("llama.attention.value_length", head_dim, default=head_dim)
    metadata.expect("llama.rope.dimension_count", head_dim, default=head_dim)
    metadata.expect("llama.rope.scaling.type", "none", default="none")
    return _LlamaShape(
        # each layer has its own tensors, so there cannot be more layers than tensors
        num_layers=metadata.count("llama.block_count", num_tensors),
        hidden_size=hidden_size,
        intermediate_size=metadata.count("llama.feed_forward_length", _MOST_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def _config(metadata: GGUFMetadata, shape: _LlamaShape, context_length: int, vocab_size: int) -> dict[str, object]:
    metadata.expect("llama.vocab_size", vocab_size, default=vocab_size)
    epsilon = metadata.require("llama.attention.layer_norm_rms_epsilon", float)
    rope_theta = metadata.get("llama.rope.freq_base", float)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": context_length,
        "rms_norm_eps": _shortest_decimal(epsilon),
        # The GGUF specification's default.
        "rope_theta": 10000.0 if rope_theta is None else _shortest_decimal(rope_theta),
        "torch_dtype": "bfloat16",
    }


def _shortest_decimal(value: float) -> float:
    """Undo the float32 storage of a decimal constant: 9.999999747378752e-06 → 1e-05."""
    return float(str(np.float32(value)))


def _targets(shape: _LlamaShape, vocab_size: int, *, tied: bool) -> dict[str, _Target]:
    """Return every tensor of the folder by its Hugging Face name."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    targets = {"model.embed_tokens.weight": _Target("token_embd.weight", (vocab_size, hidden))}
    for layer in range(shape.num_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        targets |= {
            f"{ours}.input_layernorm.weight": _Target(f"{theirs}.attn_norm.weight", (hidden,)),
            f"{ours}.self_attn.q_proj.weight": _Target(f"{theirs}.attn_q.weight", (q_rows, hidden), shape.num_heads),
            f"{ours}.self_attn.k_proj.weight": _Target(
                f"{theirs}.attn_k.weight", (kv_rows, hidden), shape.num_kv_heads
            ),
            f"{ours}.self_attn.v_proj.weight": _Target(f"{theirs}.attn_v.weight", (kv_rows, hidden)),
            f"{ours}.self_attn.o_proj.weight": _Target(f"{theirs}.attn_output.weight", (hidden, q_rows)),
            f"{ours}.post_attention_layernorm.weight": _Target(f"{theirs}.ffn_norm.weight", (hidden,)),
            f"{ours}.mlp.gate_proj.weight": _Target(f"{theirs}.ffn_gate.weight", (inner, hidden)),
            f"{ours}.mlp.up_proj.weight": _Target(f"{theirs}.ffn_up.weight", (inner, hidden)),
            f"{ours}.mlp.down_proj.weight": _Target(f"{theirs}.ffn_down.weight", (hidden, inner)),
        }
    targets["model.norm.weight"] = _Target("output_norm.weight", (hidden,))
    if not tied:
        targets["lm_head.weight"] = _Target("output.weight", (vocab_size, hidden))
    return targets


def _check_tensors(tensors: dict[str, ReaderTensor], targets: dict[str, _Target]) -> None:
    for target in targets.values():
        if target.source not in tensors:
            raise TensorMismatch(
                f"GGUF tensor {target.source!r} is missing; expected shape {target.shape}.",
                tensor=target.source,
                expected=str(target.shape),
                found="missing",
            )
        # GGUF lists dimensions fastest first, the reverse of numpy and torch.
        found = tuple(int(size) for size in reversed(tensors[target.source].shape))
        if found != target.shape:
            raise TensorMismatch(
                f"GGUF tensor {target.source!r}: expected shape {target.shape}, found {found}.",
                tensor=target.source,
                expected=str(target.shape),
                found=str(found),
            )
    known = {target.source for target in targets.values()}
    for name in tensors:
        if name not in known:
            raise TensorMismatch(
                f"GGUF tensor {name!r} is not part of a llama-architecture model; the file is not converted.",
                tensor=name,
                expected="no such tensor",
                found=f"shape {tuple(int(size) for size in reversed(tensors[name].shape))}",
            )


def _write_weights(reader: GGUFReader, targets: dict[str, _Target], path: Path, progress: bool) -> None:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with tqdm(total=len(targets), desc="Converting", unit="tensor", disable=not progress) as bar:

        def pieces(name: str) -> Iterator[npt.NDArray[np.float32]]:
            target = targets[name]
            yield from _dequantised_rows(tensors[target.source], target.permuted_heads)
            bar.update()

        write_bfloat16(path, {name: target.shape for name, target in targets.items()}, pieces)


def _dequantised_rows(tensor: ReaderTensor, permuted_heads: int) -> Iterator[npt.NDArray[np.float32]]:
    from gguf.quants import dequantize

    # In every GGUF type a row's bytes are self-contained, so rows are reordered while still quantised.
    rows = tensor.data if tensor.data.ndim == 2 else tensor.data[np.newaxis]
    order = _row_order(len(rows), permuted_heads)
    block = max(1, _VALUES_PER_BLOCK * len(rows) // tensor.n_elements)
    for start in range(0, len(rows), block):
        try:
            values = dequantize(rows[order[start : start + block]], tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"GGUF tensor {tensor.name!r}: type {tensor.tensor_type.name} has no dequantiser."
            ) from error
        yield np.asarray(values, dtype=np.float32)


def _row_order(num_rows: int, permuted_heads: int) -> npt.NDArray[np.intp]:
    """Return for each Hugging Face row the GGUF row that holds it.

    GGUF's llama architecture rotates neighbouring pairs (2i, 2i+1) of a head, Hugging Face the halves
    (i, i + D/2), so Q and K rows are interleaved in the file:
        file row 2i + h of a head  =  model row i + h * D/2        h in {0, 1}
    """
    rows = np.arange(num_rows)
    if not permuted_heads:
        return rows
    return rows.reshape(permuted_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
