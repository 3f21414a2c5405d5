"""The module that is trained: parameters by their names in the checkpoint, log-probabilities of sequences.

# B sequences, T tokens of the longest, N tokens of all
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sempre.ipc.config import BLOCK_SIZES, Device, Dtype, NumericsProfile, WorkerConfig
from sempre.ipc.errors import ConfigError
from sempre.kernels.attention import PagedBatch
from sempre.workers.device import resolve_device
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.linear_kernel import linear_kernel, with_inputs
from sempre.workers.layers.module import Build, allocate
from sempre.workers.loading import read_floats
from sempre.workers.model_length import max_model_len
from sempre.workers.models.registry import build_model, load_spec
from sempre.workers.parallel import parallel_of
from sempre.workers.process_state import ComputeState
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.steps import StepInput, row_places
from sempre.workers.trainer.logprobs import target_logprobs
from sempre.workers.trainer.tree import NoScratch, Parameters, TrainingKernel, give_gradients

# rows that the placeholders of buffers claim to have
_MOST_ROWS = 1 << 30


class Trainer(nn.Module):
    """A model with gradients, whose log-probabilities are bitwise those of an engine with the same weights.

    Parameters are float32, under the checkpoint's names; the forward pass rounds them as the engine does, and
    `named_tensors` gives them to `LLM.update_weights` in that form.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        dtype: Dtype = "auto",
        numerics_profile: NumericsProfile = "single",
        max_model_len: int | None = None,
        device: Device = "cpu",
    ) -> None:
        """Load the checkpoint in a folder; `dtype`, `numerics_profile` and `max_model_len` are those of the engine.

        Raises ModelError for a family without gradients or quantised matrices, TensorMismatch, ConfigError.
        """
        super().__init__()
        self._config = WorkerConfig(
            rank=0,
            model=str(model_path),
            model_path=str(model_path),
            dtype=dtype,
            numerics_profile=numerics_profile,
            max_model_len=max_model_len,
            device=device,
        )
        self._device = resolve_device(device, 0)
        self._spec = load_spec(Path(model_path))
        tensors, self._cache_dtype, self._stored = read_floats(self._config, self._spec)
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self._register(name, tensor.to(self._device))
        self._compute = ComputeState()
        self._build()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of tokens int64 [B, T] given those before them, float32 [B, T]; 0 for the first of each
        sequence and where the mask (None: all) is 0.

        Raises ConfigError for a mask with gaps, an id outside the vocabulary, or a sequence longer than max_model_len.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self._check_mask(input_ids, mask)
        lengths = mask.sum(dim=1)
        packed = self.packed(input_ids[mask], lengths[lengths > 0].tolist())
        return packed.new_zeros(mask.shape).masked_scatter(mask.to(packed.device), packed)

    def packed(self, token_ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The same of sequences one after the other, int64 [N], of these lengths → float32 [N]."""
        self._check(token_ids, lengths)
        with_gradient = torch.is_grad_enabled()
        with self._compute.entered(), torch.set_grad_enabled(with_gradient):
            self._load()
            step, cache = self._step(token_ids.to(self._device), lengths)
            hidden = self._model.forward(step, cache.layers)
            starts = step.batch.query_starts.long()
            targets = torch.ones(len(token_ids), dtype=torch.bool, device=self._device)
            targets[starts[:-1]] = False
            after = targets.nonzero().view(-1)
            found = target_logprobs(self._model, hidden.index_select(0, after - 1), step.token_ids[after])
            return found.new_zeros(len(token_ids)).index_copy(0, after, found)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each of the model's tensors, as an engine with the same settings stores them."""
        for name in self._names:
            values = self.get_parameter(name).detach()
            yield name, values.to(self._stored) if values.dim() > 1 else values.clone()

    def check_engine(self, fingerprint_parts: Mapping[str, str]) -> None:
        """Raise ConfigError unless an engine with this fingerprint stores and computes as this trainer does."""
        own = {
            "dtype": _name(self._cache_dtype),
            "storage": _name(self._stored),
            "quantization": "none",
            "numerics_profile": self._config.profile,
        }
        for part, value in own.items():
            found = fingerprint_parts.get(part, "absent")
            if found != value:
                raise ConfigError(
                    f"{part}: the trainer has {value}, the engine {found}; give both the same settings.",
                    parameter=part,
                    value=found,
                )

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        """As a parameter of nested modules, whose path is the tensor's name."""
        parent: nn.Module = self
        *folders, leaf = name.split(".")
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, nn.Module())
            parent = getattr(parent, folder)
        parent.register_parameter(leaf, nn.Parameter(tensor))

    def _build(self) -> None:
        if self._device.type == "cuda":
            from sempre.kernels.linear.gpu import configure

            configure()
        config = self._config
        on_cpu = self._device.type == "cpu"
        self._activations = torch.float32 if on_cpu else self._cache_dtype
        inner = with_inputs(linear_kernel("invariant"), self._cache_dtype) if on_cpu else linear_kernel("invariant")
        rounds_inputs = self._cache_dtype is torch.bfloat16 or not on_cpu
        self._kernel = TrainingKernel(inner, self._stored, self._cache_dtype if rounds_inputs else torch.float32)
        build = Build(self._kernel.seam(), NotQuantized(), parallel_of(config.profile))
        self._model = build_model(build, self._spec)
        give_gradients(self._model)
        self._scratch = NoScratch(
            _MOST_ROWS, max_model_len(config, self._spec), self._activations, self._device, stored=self._stored
        )
        self._versions: tuple[object, ...] = ()

    def _load(self) -> None:
        """The tree's tensors from the parameters."""
        named = {name: self.get_parameter(name) for name in self._names}
        versions = tuple((id(value), value._version) for value in named.values())
        self._kernel.changed(parameters=versions != self._versions)
        self._versions = versions
        tensors = Parameters(named, self._stored, self._activations)
        for path, module in self._model.walk():
            module.load(path, tensors)
        allocate(self._model, self._scratch)

    def _step(self, token_ids: torch.Tensor, lengths: Sequence[int]) -> tuple[StepInput, PagedKvCache]:
        """All sequences in one step, and the cache that it fills."""
        counts, block_size = np.asarray(lengths, np.int64), BLOCK_SIZES[self._device.type][0]
        blocks = -(-counts // block_size)
        tables = np.zeros((len(counts), int(blocks.max())), np.int32)
        firsts = np.cumsum(blocks) - blocks
        for row, (first, count) in enumerate(zip(firsts.tolist(), blocks.tolist(), strict=True)):
            tables[row, :count] = np.arange(first, first + count)
        cache = PagedKvCache(self._model.kv_layers, int(blocks.sum()), block_size, self._cache_dtype, self._device)
        places = row_places(np.zeros_like(counts), counts, tables, block_size)
        device = self._device
        batch = PagedBatch(
            block_tables=torch.from_numpy(tables).to(device),
            query_starts=torch.from_numpy(places.query_starts).to(device),
            context_lens=torch.from_numpy(counts.astype(np.int32)).to(device),
            max_query_len=int(counts.max()),
            max_context_len=int(counts.max()),
        )
        step = StepInput(
            token_ids=token_ids,
            positions=torch.from_numpy(places.positions).to(device),
            slot_mapping=torch.from_numpy(places.slot_mapping).to(device),
            batch=batch,
        )
        return step, cache

    def _check_mask(self, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        if input_ids.dim() != 2 or mask.shape != input_ids.shape:
            found = f"{tuple(input_ids.shape)} and {tuple(mask.shape)}"
            raise _refused("attention_mask", f"input_ids [B, T] and a mask of that shape, found {found}")
        edges = nn.functional.pad(mask, (1, 1)).int().diff(dim=1)
        gaps = ((edges == 1).sum(dim=1) > 1).nonzero().view(-1).tolist()
        if gaps:
            raise _refused("attention_mask", f"one run of ones per row, found several in row {gaps[0]}")

    def _check(self, token_ids: torch.Tensor, lengths: Sequence[int]) -> None:
        most, vocab_size = self._scratch.max_model_len, self._spec.vocab_size
        if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or sum(lengths) != len(token_ids) or not lengths:
            found = f"{token_ids.dtype} {list(token_ids.shape)} and lengths of {sum(lengths)}"
            raise ConfigError(f"token_ids: expected int64 [N] and lengths that add up to N, found {found}.")
        for length in lengths:
            if not 0 < length <= most:
                raise ConfigError(f"lengths: expected 1 to {most} (max_model_len), found {length}.")
        low, high = (int(value) for value in torch.aminmax(token_ids))
        if low < 0 or high >= vocab_size:
            raise ConfigError(f"token_ids: expected ids in [0, {vocab_size}), found {low} to {high}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refused(parameter: str, expected: str) -> ConfigError:
    return ConfigError(f"{parameter}: expected {expected}.", parameter=parameter)
