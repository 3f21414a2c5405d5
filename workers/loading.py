"""Loading a model: open the checkpoint, compare it with the tree, read it into the tree tensor by tensor."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from sempre.ipc.config import WorkerConfig
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.gguf_index import GGUF_INDEX_FILE
from sempre.kernels.fp8 import FP8, Fp8Scheme
from sempre.kernels.integers import BLOCK, IntegerScheme
from sempre.workers.formats import formats_of, stored_format, target_dtype
from sempre.workers.gguf_source import open_gguf
from sempre.workers.kv_cache import available_memory_bytes
from sempre.workers.layers.linear_kernel import LinearKernel, linear_kernel, with_inputs
from sempre.workers.layers.module import Build, Module, parameters
from sempre.workers.layers.separate_experts import SeparateExperts
from sempre.workers.layers.vocabulary import EMBEDDING
from sempre.workers.models.base import CausalLM
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.registry import build_model
from sempre.workers.parallel import Parallel, parallel_of
from sempre.workers.quantization.coded import CodedSource
from sempre.workers.quantization.config import (
    IntegerSpec,
    QuantizationSpec,
    StoredQuantization,
    resolve_quantization,
)
from sempre.workers.quantization.gguf_blocks import CODES
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.quantization.widened import CodedFormat, WidenedSource
from sempre.workers.tensor_source import (
    CPU,
    FLOAT_NAMES,
    DroppedSafetensors,
    DummySource,
    ModelPart,
    Parameter,
    PartSource,
    SafetensorsSource,
    TensorSource,
    mismatch,
    open_safetensors,
    tensor_bytes,
)

logger = logging.getLogger(__name__)

# of the names of a decoder's tensors; a checkpoint without a head may leave it out
_DECODER = "model."

# in old checkpoints; computed from config.json instead
HARMLESS_SUFFIX = ".rotary_emb.inv_freq"

# most mismatches that an error lists
MOST_LISTED = 20


@dataclass(frozen=True)
class Placement:
    """Where loaded tensors go."""

    device: torch.device
    upload: Callable[[torch.Tensor], torch.Tensor]
    """copies a tensor of the source to `device`; the source's must stay valid until all are loaded"""
    hashing_threads: int
    packs: bool = False
    """Whether matrices of few bits stay packed."""

    @property
    def keeps_dtype(self) -> bool:
        """Whether matrices may be stored in 16 bit with dtype float32: CPU kernels widen them on the fly."""
        return self.device.type == "cpu"

    def vector_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of hidden states, norm weights and biases for the engine's `dtype`."""
        return torch.float32 if self.keeps_dtype else dtype


ON_CPU = Placement(CPU, lambda tensor: tensor, hashing_threads=1)


@dataclass(frozen=True)
class WeightFacts:
    """Facts about a model's weights."""

    dtype: torch.dtype
    """the resolved `dtype` of the engine"""
    kv_dtype: torch.dtype
    """of the KV cache"""
    activations: torch.dtype
    """the dtype of hidden states"""
    matrix_dtype: torch.dtype
    """of the matrices that are not quantised"""
    quantization: Fp8Scheme | IntegerScheme | None
    """of the matrices that are quantised, if any are"""
    digest: str
    """SHA-256 of names, shapes, dtypes and bytes in the checkpoint; how they are split into files does not matter"""
    nbytes: int


class Loaded(NamedTuple):
    """A model with its tensors."""

    model: CausalLM
    facts: WeightFacts


def load_model(
    config: WorkerConfig,
    spec: ModelSpec,
    kernel: LinearKernel,
    placement: Placement = ON_CPU,
    parallel: Parallel | None = None,
) -> Loaded:
    """Build the tree and load it. Raises TensorMismatch or ModelError before reading any tensor, and ConfigError for a
    model that ranks cannot share.

    Matrices on the CPU: float32 keeps 16-bit checkpoints in 16 bit (widening is exact, the bits are the
    same); bfloat16 and float16 round to nearest even, and bfloat16 rounds the inputs of matmuls as well. Norm weights
    and biases are float32. On a GPU all are in `dtype`. Matrices that are quantised, by the checkpoint or by the
    setting `quantization`, are fp8 whatever `dtype` is. `parallel` is the place among the ranks, by default of a worker
    with the whole model; the digest of the weights is that of the whole.
    """
    resolved = resolve_quantization(spec.quantization, config.quantization, config.load_format)
    scheme = resolved.scheme if isinstance(resolved, QuantizationSpec | IntegerSpec) else None
    parallel = parallel or parallel_of(config.profile)
    if isinstance(resolved, IntegerSpec):
        # blocks are never cut
        parallel = replace(parallel, leaf_unit=BLOCK)
    formats = formats_of(resolved, spec, config, placement.device, packs=placement.packs)
    model = build_model(Build(kernel, formats, parallel), spec)
    wanted = parameters(model)
    with _open_source(config, spec, wanted, placement.device) as opened:
        coded = {name.removesuffix(CODES) for name in wanted if name.endswith(CODES)}
        source = opened if config.load_format == "dummy" else _own_tensors(opened, resolved, model, coded)
        _check_tensors(wanted, model, source)
        target = target_dtype(spec, source, config.dtype)
        if placement.device.type == "cpu":
            # the dtype may be the checkpoint's, which is known only now
            model = build_model(Build(with_inputs(kernel, target), formats, parallel), spec)
            _check_memory(wanted, source, target, is_fp8=scheme is not None)
        model.keep_stage()
        with ThreadPoolExecutor(max_workers=placement.hashing_threads) as pool:
            reader = _Reader(source, target, placement, pool)
            for path, module in model.walk():
                module.load(path, reader)
            reader.hash_rest(wanted)
            is_elsewhere = "embed_tokens" in model.model.elsewhere
            table = reader.matrix(source.read(EMBEDDING)[:1]) if is_elsewhere else model.model.embed_tokens.weight
            facts = WeightFacts(
                dtype=target,
                kv_dtype=FP8 if config.kv_cache_dtype == "fp8" else target,
                activations=placement.vector_dtype(target),
                matrix_dtype=table.dtype,
                quantization=scheme,
                digest=reader.digest(),
                nbytes=sum(int(tensor.nbytes) for tensor in tensors_of(model)),
            )
            return Loaded(model, facts)


class PlainTensors(NamedTuple):
    """All tensors of a model whose matrices are plain floats."""

    tensors: dict[str, torch.Tensor]
    """by name, float32 copies on the CPU"""
    dtype: torch.dtype
    """the resolved `dtype` of an engine"""
    matrix_dtype: torch.dtype
    """of its matrices"""


def read_floats(config: WorkerConfig, spec: ModelSpec) -> PlainTensors:
    """Read a whole checkpoint. Raises TensorMismatch or ModelError as `load_model`, and ModelError for quantised
    matrices."""
    resolved = resolve_quantization(spec.quantization, config.quantization, config.load_format)
    if resolved is not None:
        raise ModelError(
            f"quantization: expected matrices of plain floats, found {type(resolved).__name__}. Convert the checkpoint."
        )
    model = build_model(Build(linear_kernel("invariant"), NotQuantized()), spec)
    wanted = parameters(model)
    with _open_source(config, spec, wanted, CPU) as opened:
        source = _own_tensors(opened, resolved, model, coded=frozenset())
        _check_tensors(wanted, model, source)
        target = target_dtype(spec, source, config.dtype)
        found = {name: source.read(name).to(torch.float32, copy=True) for name in wanted}
        matrices = {FLOAT_NAMES[source.dtype_name(name)] for name in wanted if len(source.shape(name)) > 1}
    stored = target if target is not torch.float32 else reduce(torch.promote_types, sorted(matrices, key=str))
    return PlainTensors(found, target, stored)


def _own_tensors(
    checkpoint: TensorSource, stored: StoredQuantization | IntegerSpec | None, model: CausalLM, coded: Set[str]
) -> TensorSource:
    """The tensors of this model, by its own names, and widened where they are stored in fewer bits, if not `coded`."""
    source, form = checkpoint, stored_format(stored)
    if form is not None:
        widened = WidenedSource(checkpoint, form)
        source = CodedSource(widened, form, coded) if coded and isinstance(form, CodedFormat) else widened
    if model.part is not None:
        source = PartSource(source, model.part)
        architecture = model.spec.architecture
        logger.info("%s: only the text part is loaded; images and sounds are not understood", architecture)
    elif model.spec.pooling is not None and not any(name.startswith(_DECODER) for name in source.names()):
        source = PartSource(source, ModelPart({"": _DECODER}, ()))
    return SeparateExperts(source) if model.may_stack_experts else source


@contextmanager
def _open_source(
    config: WorkerConfig, spec: ModelSpec, wanted: Mapping[str, Parameter], device: torch.device
) -> Iterator[TensorSource]:
    """The checkpoint's tensors, or dummy ones."""
    if config.load_format == "dummy":
        name = config.dtype if config.dtype != "auto" else spec.checkpoint_dtype or "float32"
        yield DummySource(wanted, getattr(torch, name), config.seed, spec.initializer_range, device)
    else:
        folder = Path(config.weights_folder)
        integers = {name.removesuffix(CODES) for name in wanted if name.endswith(CODES)}
        kind = DroppedSafetensors if device.type == "cpu" else SafetensorsSource
        is_gguf = (folder / GGUF_INDEX_FILE).exists()
        with open_gguf(folder, integers) if is_gguf else open_safetensors(folder, kind) as source:
            yield source


def _check_tensors(wanted: Mapping[str, Parameter], model: CausalLM, source: TensorSource) -> None:
    """Raise TensorMismatch, which lists what is missing, surplus, or of another shape or dtype.

    Tensors that the model has as `copies` may be present, and must then equal those that are read.
    """
    copies, present = model.copies, {name for name in source.names() if not name.startswith(model.unread)}
    found = [error for name, parameter in wanted.items() if (error := _wrong(name, parameter, present, source))]
    for name in sorted(present):
        if name in copies:
            # a missing one has been reported already
            if copies[name] in present and not _same_tensor(source, name, copies[name]):
                found.append(mismatch(name, f"a copy of {copies[name]} (tie_word_embeddings is true)", "other values"))
        elif name not in wanted and not name.endswith(HARMLESS_SUFFIX):
            found.append(mismatch(name, "no such tensor in this architecture", f"shape {list(source.shape(name))}"))
    if found:
        raise _together(found)


def _check_memory(wanted: Mapping[str, Parameter], source: TensorSource, dtype: torch.dtype, *, is_fp8: bool) -> None:
    """Raise ModelError for weights that cannot fit, before the first is created."""
    needed = 0
    for name, parameter in wanted.items():
        # what is packed in bytes is widened to 16 bit
        stored = FLOAT_NAMES.get(source.dtype_name(name), torch.bfloat16)
        itemsize = 1 if is_fp8 else min(stored.itemsize, dtype.itemsize)
        needed += math.prod(parameter.shape) * parameter.elements * itemsize
    free = available_memory_bytes()
    if needed > free:
        raise ModelError(
            f"config.json: expected weights that fit into the {free} bytes of free memory, found sizes that make at "
            f"least {needed} bytes. Choose a smaller model, or free memory."
        )


def tensors_of(model: Module) -> Iterator[torch.Tensor]:
    """All loaded tensors, as they are in memory."""
    for _, module in model.walk():
        yield from module.own_tensors()


def live_digest(model: Module) -> str:
    """SHA-256 over the loaded tensors as they are in memory now."""
    digest = hashlib.sha256()
    for tensor in tensors_of(model):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _wrong(name: str, parameter: Parameter, present: set[str], source: TensorSource) -> TensorMismatch | None:
    if name not in present:
        hint = " (tie_word_embeddings is false)" if name == "lm_head.weight" else ""
        return mismatch(name, f"a tensor of shape {list(parameter.shape)}{hint}", "nothing")
    if source.shape(name) != parameter.shape:
        return mismatch(name, f"shape {list(parameter.shape)}", f"shape {list(source.shape(name))}")
    if source.dtype_name(name) not in parameter.dtypes:
        return mismatch(name, f"dtype {', '.join(parameter.dtypes)}", f"dtype {source.dtype_name(name)}")
    return None


def _together(found: list[TensorMismatch]) -> TensorMismatch:
    first = found[0]
    if len(found) == 1:
        return first
    more = f"\n… and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    text = f"{len(found)} tensors do not fit this architecture:\n" + "\n".join(map(str, found[:MOST_LISTED])) + more
    return TensorMismatch(text, tensor=first.tensor, expected=first.expected, found=first.found)


def _same_tensor(source: TensorSource, a: str, b: str) -> bool:
    first, second = source.read(a), source.read(b)
    return first.dtype == second.dtype and torch.equal(first, second)


class _Reader:
    """Reads tensors, and hashes each in `pool` while it is placed and packed."""

    def __init__(
        self, source: TensorSource, dtype: torch.dtype, placement: Placement, pool: ThreadPoolExecutor
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._placement = placement
        self._vector_dtype = placement.vector_dtype(dtype)
        self._pool = pool
        self._hashes: dict[str, Future[bytes]] = {}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if name not in self._hashes:
            self._hashes[name] = self._pool.submit(self._source.digest, name, tensor)
        return self._placement.upload(tensor)

    def vector(self, name: str) -> torch.Tensor:
        return self.read(name).to(self._vector_dtype, copy=True)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._dtype == torch.float32 and self._placement.keeps_dtype:
            return tensor
        return tensor.to(self._dtype)

    def hash_rest(self, names: Iterable[str]) -> None:
        """Hash those that were not read, because other ranks have them."""
        for name in names:
            if name not in self._hashes:
                self._hashes[name] = self._pool.submit(self._source.digest, name, self._source.read(name))

    def digest(self) -> str:
        return hashlib.sha256(b"".join(self._hashes[name].result() for name in sorted(self._hashes))).hexdigest()
