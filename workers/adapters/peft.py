"""A PEFT folder read for one model: which linear layers get which A and B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from sempre.ipc.adapter_files import WEIGHTS_FILE
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.kernels.lora import AdapterWeight
from sempre.workers.adapters.config import ALL_LINEAR, AdapterConfig, read_config
from sempre.workers.layers.expert_linear import ExpertLinear
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.lora import AdapterPart
from sempre.workers.models.base import CausalLM
from sempre.workers.tensor_source import FLOAT_NAMES

# PEFT's wrapper, before a module's name in the model
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_UNSUPPORTED = {
    "lora_embedding_": "adapters of embeddings are not supported",
    "lora_magnitude_vector": "DoRA is not supported; merge the adapter into the checkpoint",
    "lora_bias": "biases of adapters are not supported",
    ".lora_A.bias": "biases of adapters are not supported",
    ".lora_B.bias": "biases of adapters are not supported",
}
_MOST_NAMED = 5

Adapter = dict[str, tuple[AdapterWeight | None, ...]]
"""By the path of a linear layer: its parts, in order."""


class _Target(NamedTuple):
    """A projection that an adapter may change, in one of the layers that read it."""

    path: str
    place: int
    """among the layer's parts"""
    part: AdapterPart
    in_features: int
    """of the layer in the checkpoint"""


def adaptable_linears(model: CausalLM) -> Iterator[tuple[str, Linear]]:
    """Linear layers that adapters may change: neither experts nor routers, nor the vocabulary's head."""
    for path, linear in model.linears():
        if linear.use is Use.PLAIN and not isinstance(linear, ExpertLinear):
            yield path, linear


def read_adapter(folder: Path, model: CausalLM, max_rank: int) -> Adapter:
    """Read an adapter for this worker's part of the model. Raises ModelError naming the file, the field or
    tensor, what is expected and what is found: for unsupported kinds, a rank above `max_rank`, modules that the
    model does not have, missing or surplus tensors, and wrong shapes or dtypes."""
    config = read_config(folder)
    for field, rank in (("r", config.rank), *((f"rank_pattern.{k}", r) for k, r in config.rank_pattern.items())):
        if rank > max_rank:
            config.refuse(field, f"at most max_lora_rank={max_rank}", rank)
    with _opened(folder / WEIGHTS_FILE) as file:
        return _Reader(config, file, folder / WEIGHTS_FILE, model).read()


class _Reader:
    """One file's tensors, by the model's own names."""

    def __init__(self, config: AdapterConfig, file: Any, source: Path, model: CausalLM) -> None:
        self._config = config
        self._file = file
        self._source = source
        self._linears = dict(adaptable_linears(model))
        self._targets: dict[str, list[_Target]] = {}
        # a worker says what is wrong with any part of the file, not with its own stage's alone
        for path, linear in adaptable_linears(model.all_stages):
            for place, part in enumerate(linear.adapter_parts(path)):
                target = _Target(path, place, part, linear.stored_inputs)
                self._targets.setdefault(part.module, []).append(target)
        self._model = model
        self._stored: dict[str, dict[str, str]] = {}
        """by module: which tensor of the file is its A, and which its B"""

    def read(self) -> Adapter:
        for name in sorted(self._file.keys()):
            module, suffix = self._module(name)
            self._stored.setdefault(module, {})[suffix] = name
        expected = [module for module in self._targets if self._config.changes(module)]
        if not expected and self._config.targets != ALL_LINEAR:
            self._config.refuse("target_modules", f"modules of this model ({self._known()})", self._config.targets)
        for module in dict.fromkeys([*self._stored, *expected]):
            self._check_pair(module)
        parts: dict[str, list[AdapterWeight | None]] = {}
        for module in self._stored:
            a, b = self._matrices(module)
            for target in self._targets[module]:
                if target.path not in self._linears:
                    continue
                own = b if target.part.rows is None else b.index_select(0, target.part.rows)
                count = len(self._linears[target.path].parts)
                parts.setdefault(target.path, [None] * count)[target.place] = AdapterWeight(a, own.contiguous())
        return {path: tuple(each) for path, each in parts.items()}

    def _module(self, name: str) -> tuple[str, str]:
        """The module of the model that a tensor belongs to, and whether it is A or B."""
        for mark, reason in _UNSUPPORTED.items():
            if mark in name:
                self._fail(name, f"no such tensor, since {reason}", "it")
        suffix = next((each for each in (_A, _B) if name.endswith(each)), None)
        if suffix is None or not name.startswith(_PREFIX):
            expected = f"names {_PREFIX}<module>{_A} and {_B}; whole modules (modules_to_save) are not supported"
            self._fail(name, expected, "it")
        module = name.removeprefix(_PREFIX).removesuffix(suffix)
        if self._model.part is not None:
            module = self._model.part.own_name(module)
        if module not in self._targets:
            kind = "a linear layer that adapters may change"
            if any(word in module for word in (".experts", "lm_head", "embed_tokens", ".gate")):
                kind += ", neither experts, routers, embeddings nor the vocabulary's head"
            self._fail(name, f"{kind} ({self._known()})", f"module {module!r}")
        return module, suffix

    def _check_pair(self, module: str) -> None:
        for suffix in (_A, _B):
            if suffix not in self._stored.get(module, {}):
                self._fail(f"{_PREFIX}{module}{suffix}", "a tensor, by target_modules and its other half", "nothing")

    def _matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [N, r] times the scale, both float32."""
        target, rank = self._targets[module][0], self._config.rank_of(module)
        names = self._stored[module]
        a = self._matrix(names[_A], (rank, target.in_features))
        b = self._matrix(names[_B], (target.part.num_stored, rank))
        return a, b * self._config.scale_of(module)

    def _matrix(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        stored = self._file.get_slice(name)
        found, dtype = tuple(stored.get_shape()), str(stored.get_dtype())
        if found != shape:
            self._fail(name, f"shape {list(shape)}", f"shape {list(found)}")
        if dtype not in FLOAT_NAMES:
            self._fail(name, f"dtype {', '.join(FLOAT_NAMES)}", f"dtype {dtype}")
        matrix: torch.Tensor = self._file.get_tensor(name).to(torch.float32, copy=True)
        if not bool(torch.isfinite(matrix).all()):
            self._fail(name, "finite numbers", "infinities or NaN")
        return matrix

    def _known(self) -> str:
        names = list(dict.fromkeys(module.rpartition(".")[2] for module in self._targets))
        return ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")

    def _fail(self, tensor: str, expected: str, found: str) -> NoReturn:
        text = f"{self._source}: tensor {tensor!r}: expected {expected}, found {found}."
        raise TensorMismatch(text, tensor=tensor, expected=expected, found=found)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(str(path), framework="pt")
    # a header with wrong sizes, offsets or text is detected by the library, a file larger than memory by torch
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be opened as safetensors: {error}") from error
    with file as opened:
        yield opened
