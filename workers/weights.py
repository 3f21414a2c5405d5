"""The decoder's weights: which tensors a ModelSpec expects, and loading them tensor by tensor into packed form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import NoReturn

import torch

from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.kernels.fp8 import QuantizedWeight, quantize_channels
from sempre.workers.kv_cache import available_memory_bytes
from sempre.workers.models.decoder import DecoderWeights, LayerWeights
from sempre.workers.models.numerics import LinearKernel, Packed
from sempre.workers.models.quantization import QuantizationSpec, resolve_quantization
from sempre.workers.models.spec import ModelSpec
from sempre.workers.tensor_source import (
    CPU,
    FLOAT_NAMES,
    FP8_NAME,
    DummySource,
    TensorSource,
    open_safetensors,
    tensor_bytes,
)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SCALE_SUFFIX = "_scale"  # after the name of the matrix that it belongs to

# tensors that old checkpoints carry and that are computed from config.json instead
HARMLESS_SUFFIX = ".rotary_emb.inv_freq"


def expected_shapes(spec: ModelSpec, quantization: QuantizationSpec | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the spec's decoder reads; lm_head is absent when tied."""
    shapes = _decoder_shapes(spec)
    for name, shape in list(shapes.items()):
        if _is_stored_fp8(quantization, name):
            assert quantization is not None
            shapes[name + SCALE_SUFFIX] = (shape[0], 1) if quantization.weight_scales == "channel" else (1,)
    return shapes


def _is_stored_fp8(quantization: QuantizationSpec | None, name: str) -> bool:
    """Whether the tensor `name` is a matrix that the checkpoint holds in fp8."""
    module = name.removesuffix(".weight")
    return quantization is not None and quantization.stored and module != name and quantization.covers(module)


def _decoder_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    for index in range(spec.num_layers):
        layer = f"model.layers.{index}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for part, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{attention}{part}_proj.weight"] = (size, hidden)
            if spec.qkv_bias:
                shapes[f"{attention}{part}_proj.bias"] = (size,)
        if spec.qk_norm:
            shapes[attention + "q_norm.weight"] = (spec.head_dim,)
            shapes[attention + "k_norm.weight"] = (spec.head_dim,)
        shapes[attention + "o_proj.weight"] = (hidden, q_size)
        if spec.o_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for part, out_size, in_size in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            shapes[f"{mlp}{part}_proj.weight"] = (out_size, in_size)
            if spec.mlp_bias:
                shapes[f"{mlp}{part}_proj.bias"] = (out_size,)
    shapes[FINAL_NORM] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    return shapes


@dataclass(frozen=True)
class Placement:
    """Where loaded tensors go."""

    device: torch.device
    upload: Callable[[torch.Tensor], torch.Tensor]
    """a tensor of the source → the tensor on `device`; the source's must stay valid until all are loaded"""
    hashing_threads: int

    @property
    def keeps_storage(self) -> bool:
        """Whether matrices may be stored in 16 bit under dtype float32: the CPU's kernels widen them as they go."""
        return self.device.type == "cpu"


ON_CPU = Placement(CPU, lambda tensor: tensor, hashing_threads=1)


def load_weights(
    spec: ModelSpec,
    folder: Path,
    product: LinearKernel,
    *,
    dtype: str,
    load_format: str,
    seed: int,
    quantization: str | None = None,
    placement: Placement = ON_CPU,
) -> DecoderWeights:
    """Load and pack; `dtype` auto is the checkpoint's. Raises TensorMismatch or ModelError before reading any tensor.

    Storage of the matrices on the CPU: float32 keeps 16-bit checkpoints in 16 bit (widening is exact, the bits are the
    same); bfloat16 and float16 round to nearest even. Norm weights and biases are float32. On a GPU all are in `dtype`.
    Matrices that are quantised, by the checkpoint or by the setting `quantization`, are fp8 whatever `dtype` is.
    """
    resolved = resolve_quantization(spec.quantization, quantization, load_format)
    shapes = expected_shapes(spec, resolved)
    with _open_source(spec, shapes, folder, dtype, load_format, seed, placement.device) as source:
        _check(spec, shapes, source, resolved)
        target = _target_dtype(spec, source, dtype)
        if placement.device.type == "cpu":
            _check_memory(shapes, source, target, is_quantized=resolved is not None)
        with ThreadPoolExecutor(max_workers=placement.hashing_threads) as pool:
            return _Loader(spec, source, target, product, placement, pool, resolved).load()


@contextmanager
def _open_source(
    spec: ModelSpec,
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtype: str,
    load_format: str,
    seed: int,
    device: torch.device,
) -> Iterator[TensorSource]:
    if load_format == "dummy":
        name = dtype if dtype != "auto" else spec.checkpoint_dtype or "float32"
        yield DummySource(shapes, getattr(torch, name), seed, spec.initializer_range, device)
    else:
        with open_safetensors(folder) as source:
            yield source


def _target_dtype(spec: ModelSpec, source: TensorSource, dtype: str) -> torch.dtype:
    name = dtype if dtype != "auto" else spec.checkpoint_dtype
    return FLOAT_NAMES[source.dtype_name(EMBEDDING)] if name is None else getattr(torch, name)


def _mismatch(tensor: str, expected: str, found: str) -> NoReturn:
    message = f"tensor {tensor!r}: expected {expected}, found {found}."
    raise TensorMismatch(message, tensor=tensor, expected=expected, found=found)


def _check(
    spec: ModelSpec, shapes: dict[str, tuple[int, ...]], source: TensorSource, quantization: QuantizationSpec | None
) -> None:
    present = set(source.names())
    for name, shape in shapes.items():
        if name not in present:
            hint = " (tie_word_embeddings is false)" if name == LM_HEAD else ""
            _mismatch(name, f"a tensor of shape {list(shape)}{hint}", "nothing")
        if source.shape(name) != shape:
            _mismatch(name, f"shape {list(shape)}", f"shape {list(source.shape(name))}")
    for name in sorted(present):
        if name.endswith(HARMLESS_SUFFIX):
            continue
        if name not in shapes and not (name == LM_HEAD and spec.tie_word_embeddings):
            _mismatch(name, "no such tensor in this architecture", f"shape {list(source.shape(name))}")
        allowed = (FP8_NAME,) if _is_stored_fp8(quantization, name) else tuple(FLOAT_NAMES)
        if source.dtype_name(name) not in allowed:
            _mismatch(name, f"dtype {', '.join(allowed)}", f"dtype {source.dtype_name(name)}")
    if spec.tie_word_embeddings and LM_HEAD in present and not _same_tensor(source, LM_HEAD, EMBEDDING):
        _mismatch(LM_HEAD, f"a copy of {EMBEDDING} (tie_word_embeddings is true)", "other values")


def _check_memory(
    shapes: dict[str, tuple[int, ...]], source: TensorSource, dtype: torch.dtype, *, is_quantized: bool
) -> None:
    """Raise ModelError for weights that cannot fit, before the first of them is made."""
    needed = 0
    for name, shape in shapes.items():
        stored = FLOAT_NAMES.get(source.dtype_name(name), dtype)
        needed += math.prod(shape) * (1 if is_quantized else min(stored.itemsize, dtype.itemsize))
    free = available_memory_bytes()
    if needed > free:
        raise ModelError(
            f"config.json: expected weights that fit into the {free} bytes of free memory, found sizes that make at "
            f"least {needed} bytes. Choose a smaller model, or free memory."
        )


def _same_tensor(source: TensorSource, a: str, b: str) -> bool:
    first, second = source.read(a), source.read(b)
    return first.dtype == second.dtype and torch.equal(first, second)


class _Loader:
    """Reads each tensor once, hashes it in `pool` while it is placed and packed, and lets go of it."""

    def __init__(
        self,
        spec: ModelSpec,
        source: TensorSource,
        dtype: torch.dtype,
        product: LinearKernel,
        placement: Placement,
        pool: ThreadPoolExecutor,
        quantization: QuantizationSpec | None,
    ) -> None:
        self._spec = spec
        self._source = source
        self._dtype = dtype
        self._product = product
        self._placement = placement
        self._vector_dtype = torch.float32 if placement.keeps_storage else dtype
        self._pool = pool
        self._quantization = quantization
        self._hashes: dict[str, Future[bytes]] = {}

    def load(self) -> DecoderWeights:
        spec = self._spec
        # a copy: a view would keep the whole file mapped
        embedding = self._stored(self._read(EMBEDDING)).clone(memory_format=torch.contiguous_format)
        layers = tuple(self._layer(f"model.layers.{index}.") for index in range(spec.num_layers))
        final_norm = self._vector(FINAL_NORM)
        if spec.tie_word_embeddings:
            lm_head = self._product.pack(embedding, None)
        else:
            lm_head = self._linear(LM_HEAD.removesuffix(".weight"))
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            final_norm=final_norm,
            lm_head=lm_head,
            dtype=self._dtype,
            storage=embedding.dtype,
            quantization=self._quantization.scheme if self._quantization is not None else None,
            digest=self._digest(),
        )

    def _layer(self, layer: str) -> LayerWeights:
        spec = self._spec
        attention, mlp = layer + "self_attn.", layer + "mlp."
        return LayerWeights(
            input_norm=self._vector(layer + "input_layernorm.weight"),
            qkv=self._linear(*(f"{attention}{part}_proj" for part in "qkv"), bias=spec.qkv_bias),
            q_norm=self._vector(attention + "q_norm.weight") if spec.qk_norm else None,
            k_norm=self._vector(attention + "k_norm.weight") if spec.qk_norm else None,
            o=self._linear(attention + "o_proj", bias=spec.o_bias),
            post_attention_norm=self._vector(layer + "post_attention_layernorm.weight"),
            gate_up=self._linear(mlp + "gate_proj", mlp + "up_proj", bias=spec.mlp_bias),
            down=self._linear(mlp + "down_proj", bias=spec.mlp_bias),
        )

    def _linear(self, *names: str, bias: bool = False) -> Packed:
        """The named projections, fused along their outputs in the order given."""
        biases = torch.cat([self._vector(name + ".bias") for name in names]) if bias else None
        if self._quantization is not None and any(self._quantization.covers(name) for name in names):
            return self._fp8_linear(self._quantization, names, biases)
        parts = [self._stored(self._read(name + ".weight")) for name in names]
        common = reduce(torch.promote_types, (part.dtype for part in parts))
        weight = torch.cat([part.to(common) for part in parts]) if len(parts) > 1 else parts[0]
        return self._product.pack(weight, biases)

    def _fp8_linear(self, quantization: QuantizationSpec, names: tuple[str, ...], bias: torch.Tensor | None) -> Packed:
        for name in names:
            if not quantization.covers(name):
                beside = ", ".join(other for other in names if quantization.covers(other))
                _mismatch(name + ".weight", f"fp8 like {beside}, with which it is one product", "an ignored module")
        parts = [self._quantized(quantization, name + ".weight") for name in names]
        # bytes: not every device can join fp8 tensors
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
        return self._product.pack_fp8(values, torch.cat([part.scale for part in parts]), bias, quantization.scheme)

    def _quantized(self, quantization: QuantizationSpec, name: str) -> QuantizedWeight:
        tensor = self._read(name)
        if not quantization.stored:
            quantized = quantize_channels(tensor)
        else:
            scale = self._read(name + SCALE_SUFFIX).float().reshape(-1)
            quantized = QuantizedWeight(tensor, scale.expand(tensor.shape[0]))
        for part, found in ((name + SCALE_SUFFIX, quantized.scale), (name, quantized.values.view(torch.uint8))):
            # fp8 has no infinity, and two patterns of NaN
            wrong = ~found.isfinite() if part != name else (found & 0x7F) == 0x7F
            if bool(wrong.any()):
                _mismatch(part, "finite values", f"{int(wrong.sum())} that are not")
        return quantized

    def _vector(self, name: str) -> torch.Tensor:
        return self._read(name).to(self._vector_dtype, copy=True)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._dtype == torch.float32 and self._placement.keeps_storage:
            return tensor
        return tensor.to(self._dtype)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        self._hashes[name] = self._pool.submit(self._source.digest, name, tensor)
        return self._placement.upload(tensor)

    def _digest(self) -> str:
        return hashlib.sha256(b"".join(self._hashes[name].result() for name in sorted(self._hashes))).hexdigest()


def live_digest(weights: DecoderWeights) -> str:
    """SHA-256 over the loaded tensors as they are in memory now."""
    digest = hashlib.sha256()
    for tensor in _tensors(weights):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
