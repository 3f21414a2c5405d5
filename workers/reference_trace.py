"""Every module's results beside those of `transformers`, which computes the same sequence from the same checkpoint.

The reference computes in float32. Its bits are not expected: of each module, the element that is furthest from it is
reported, relative to the largest of its row. The first module that is far away is where two implementations differ.
Modules are known by their paths in the checkpoint; one that computes several of the reference's at once is compared
with all of these, side by side. What the reference does not compute as such is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sempre.ipc.errors import ConfigError, ModelError
from sempre.workers.module_trace import TracedResult

_LOGITS = "logits"


class ReferenceModule(NamedTuple):
    """What a module of the reference returned."""

    rows: torch.Tensor
    """float32 [T, …]"""
    is_leaf: bool


def compare_methods(trace: Callable[[list[int]], list[TracedResult]]) -> dict[str, Callable[..., object]]:
    """Methods of a worker that compare what `trace` returns for a prompt."""

    def compare_with_transformers(folder: str, token_ids: list[int]) -> list[list[object]]:
        """Path, operation, number of rows, and of the furthest element: row, place, both values. In the order of
        computing; without values for what the reference does not compute."""
        return list(compared(trace(token_ids), reference_results(folder, token_ids)))

    return {"compare_with_transformers": compare_with_transformers}


def reference_results(folder: str, token_ids: Sequence[int]) -> dict[str, ReferenceModule]:
    """Compute a sequence with transformers; return what each module returned, in order. Raises ConfigError without the
    library, ModelError for a checkpoint that it cannot load."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"transformers: expected the library, found none ({error}). Install it: pip install transformers.",
            parameter="transformers",
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: transformers cannot load it: {error}") from error
    found: dict[str, ReferenceModule] = {}
    count = len(token_ids)

    def note(name: str, module: torch.nn.Module) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, torch.Tensor) and first.dim() > 1 and first.shape[:2] == (1, count):
                rows = first.detach()[0].to(torch.float32, copy=True)
                found[name] = ReferenceModule(rows, not any(module.children()))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name, module))
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)], dtype=torch.int64, device="cpu")).logits[0]
    return {**found, _LOGITS: ReferenceModule(logits.to(torch.float32), is_leaf=True)}


def compared(results: Sequence[TracedResult], reference: Mapping[str, ReferenceModule]) -> Iterator[list[object]]:
    """Yield what `compare_with_transformers` tells of each result."""
    paths = [result.path for result in results]
    seen: set[str] = set()
    for result in results:
        path, rows = result.path, result.rows.to(torch.float32)
        told: list[object] = [path, result.operation, rows.shape[0]]
        other = None
        if path not in seen:
            # a norm also returns the sum that it has read, and a block what its norm is to add
            is_split = paths.count(path) > 1
            other = _partner(path, rows.shape, reference, allows_blocks=not is_split)
        seen.add(path)
        yield told if other is None else [*told, *_furthest(rows, other)]


def _partner(
    path: str, shape: torch.Size, reference: Mapping[str, ReferenceModule], *, allows_blocks: bool
) -> torch.Tensor | None:
    """What the reference has for a module: its own result, or those of neighbours that have the width together."""
    own = reference.get(path)
    if own is not None:
        return own.rows if own.rows.shape == shape and (own.is_leaf or allows_blocks) else None
    if len(shape) != 2:
        return None
    parent = path.rpartition(".")[0]
    leaves = [
        module.rows
        for name, module in reference.items()
        if name.rpartition(".")[0] == parent and module.is_leaf and module.rows.dim() == 2
    ]
    for first in range(len(leaves)):
        for last in range(first + 2, len(leaves) + 1):
            if sum(rows.shape[1] for rows in leaves[first:last]) == shape[1]:
                return torch.cat(leaves[first:last], dim=1)
    return None


def _furthest(rows: torch.Tensor, other: torch.Tensor) -> list[object]:
    """Row and place of the element that is furthest from the reference for its row's size, and both values."""
    own, other = rows.flatten(1), other.flatten(1)
    sizes = other.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    place = int(((own - other).abs() / sizes).nan_to_num(nan=torch.inf).argmax())
    row, column = divmod(place, own.shape[1])
    return [row, column, own[row, column].item(), other[row, column].item(), sizes[row, 0].item()]
