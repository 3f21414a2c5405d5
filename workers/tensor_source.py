"""Where tensors come from: a folder of safetensors files (memory-mapped), or seeded random numbers."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open

from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.model_files import check_regular, read_json_object, shown
from sempre.workers.host_memory import MappedFiles

# safetensors' names of the dtypes a weight may have
FLOAT_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8_NAME = "F8_E4M3"

CPU = torch.device("cpu")

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# of the tensors that were read last
_KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Parameter:
    """A checkpoint tensor that a model reads."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(FLOAT_NAMES)
    """allowed ones, by safetensors' names"""
    initial: Literal["normal", "ones", "zeros"] = "normal"
    """its contents in dummy weights"""
    elements: int = 1
    """numbers of the model in one element"""


def mismatch(tensor: str, expected: str, found: str) -> TensorMismatch:
    """The error for one tensor, to be raised."""
    message = f"tensor {tensor!r}: expected {expected}, found {found}."
    return TensorMismatch(message, tensor=tensor, expected=expected, found=found)


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype_name(self, name: str) -> str:
        """Safetensors' name of the dtype, for example BF16."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a memory-mapped view where possible, not to be written to."""
        ...

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        """SHA-256 that identifies the tensor: over its name, shape, dtype and bytes, or what determines them."""
        ...


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that its index names."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files
        """tensor name → open file that holds it"""

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        return _content_digest(name, tensor)


class DroppedSafetensors(SafetensorsSource):
    """The same, of which a tensor's part of the mapped file leaves the memory when it is hashed, and when others have
    been read since. So a file is not in memory beside what a CPU makes of it; reading again only takes longer."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        super().__init__(files)
        self._mapped = MappedFiles()
        self._last_read: deque[torch.Tensor] = deque()
        # formats read again what they hash, in other threads
        self._lock = Lock()

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        with self._lock:
            self._last_read.append(tensor)
            while len(self._last_read) > 1 and sum(read.nbytes for read in self._last_read) > _KEPT_BYTES:
                self._mapped.drop(self._last_read.popleft())
        return tensor

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        found = super().digest(name, tensor)
        self._mapped.drop(tensor)
        return found


@dataclass(frozen=True)
class ModelPart:
    """A model within a checkpoint that holds more."""

    prefixes: Mapping[str, str]
    """of the names of its tensors: stored → in the model by itself"""
    others: tuple[str, ...]
    """prefixes of the tensors of the rest"""

    def own_name(self, stored: str) -> str:
        """The name that the model by itself has for a tensor of this part."""
        for prefix, own in self.prefixes.items():
            if stored.startswith(prefix):
                return own + stored.removeprefix(prefix)
        return stored


class PartSource:
    """The tensors of one part of a checkpoint, by their own names."""

    def __init__(self, source: TensorSource, part: ModelPart) -> None:
        self._source = source
        self._stored = {part.own_name(name): name for name in source.names() if not name.startswith(part.others)}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored[name])

    def dtype_name(self, name: str) -> str:
        return self._source.dtype_name(self._stored[name])

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._stored[name])

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        return self._source.digest(name, tensor)


class DummySource:
    """Random weights as at initialisation: normal with `std`, or ones or zeros; a pure function of the seed.

    They are generated on `device`; a GPU's generator gives other numbers than the CPU's.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        dtype: torch.dtype,
        seed: int,
        std: float,
        device: torch.device = CPU,
    ) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self._seed = seed
        self._std = std
        self._device = device

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parameters[name].shape

    def dtype_name(self, name: str) -> str:
        return next(key for key, dtype in FLOAT_NAMES.items() if dtype == self._dtype)

    def read(self, name: str) -> torch.Tensor:
        shape, initial = self._parameters[name].shape, self._parameters[name].initial
        if initial == "ones":
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if initial == "zeros":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # seeded by name, so that the order of reading cannot matter; never the global generator
        key = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(key[:8], "little"))
        if self._device.type == "cpu":
            return (
                torch.empty(shape, dtype=torch.float32, device=CPU)
                .normal_(0.0, self._std, generator=generator)
                .to(self._dtype)
            )
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0.0, self._std, generator=generator)

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        if self._device.type == "cpu":
            return _content_digest(name, tensor)
        origin = f"{self._device.type} normal {self._seed} {self._std!r} {name} {list(tensor.shape)} {tensor.dtype}"
        return hashlib.sha256(origin.encode()).digest()


def _content_digest(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements' bytes in row order, without a copy where the tensor is contiguous and on the CPU."""
    data: memoryview = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data


@contextmanager
def open_safetensors(folder: Path, kind: type[SafetensorsSource] = SafetensorsSource) -> Iterator[SafetensorsSource]:
    """Open the checkpoint's files; raises ModelError naming the file or the index entry that does not fit."""
    with ExitStack() as stack:
        if (folder / INDEX_FILE).exists():
            yield kind(_open_shards(stack, folder))
        elif (folder / SINGLE_FILE).exists():
            opened = _open(stack, folder / SINGLE_FILE)
            yield kind(dict.fromkeys(opened.keys(), opened))
        else:
            found = sorted(path.name for path in folder.glob("*.*") if path.suffix in (".bin", ".pt", ".safetensors"))
            raise ModelError(
                f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found {', '.join(found) or 'no weight files'}. "
                "Weights are read from safetensors only; pickled ones are refused."
            )


def _open(stack: ExitStack, path: Path) -> Any:
    check_regular(path)
    try:
        return stack.enter_context(safe_open(str(path), framework="pt"))
    # A header with wrong sizes, offsets or text is detected by the library, a file larger than memory by torch.
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be opened as safetensors: {error}") from error


def _open_shards(stack: ExitStack, folder: Path) -> dict[str, Any]:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(
            f"{index}: weight_map: expected an object of tensor name to file name, found {shown(weight_map)}."
        )
    shards: dict[str, Any] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        if Path(file_name).name != file_name:
            raise ModelError(f"{index}: weight_map: expected plain file names, found {shown(file_name)}.")
        shards[file_name] = _open(stack, folder / file_name)
    held = {file_name: set(shard.keys()) for file_name, shard in shards.items()}
    for tensor, file_name in weight_map.items():
        if tensor not in held[file_name]:
            raise TensorMismatch(
                f"{index}: tensor {tensor!r}: expected in {file_name}, found nothing there.",
                tensor=tensor,
                expected=file_name,
                found="nothing",
            )
    for file_name, names in held.items():
        for tensor in sorted(names):
            if weight_map.get(tensor) != file_name:
                raise TensorMismatch(
                    f"{index}: tensor {tensor!r} of {file_name}: expected in the index, found nothing there.",
                    tensor=tensor,
                    expected=f"{file_name} in {INDEX_FILE}",
                    found=str(weight_map.get(tensor)),
                )
    return {tensor: shards[file_name] for tensor, file_name in weight_map.items()}
