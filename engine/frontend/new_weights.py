"""Weights that a user hands to a running engine: files that workers, and the successors of those that die, read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple

from sempre.engine.parameter_checks import shown
from sempre.ipc.errors import RequestError

if TYPE_CHECKING:
    import torch

Running = Literal["finish", "restart"]
"""What becomes of unfinished requests: they finish with the old weights, or begin again with the new ones."""

NamedTensors = Mapping[str, "torch.Tensor"] | Iterable[tuple[str, "torch.Tensor"]]


class NewWeights(NamedTuple):
    """A folder of weights."""

    path: str
    owned: TemporaryDirectory[str] | None = None
    """the folder, if it lives only as long as its weights are in use"""

    def remove(self) -> None:
        """The engine does not use them."""
        if self.owned is not None:
            self.owned.cleanup()


def weights_of_folder(path: str | PathLike[str]) -> NewWeights:
    """Weights that a user saved. Raises RequestError unless it is a folder."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise _refused("path", f"must be a folder with safetensors, found none at {folder}.", path)
    return NewWeights(str(folder))


def weights_of_tensors(named_tensors: NamedTensors) -> NewWeights:
    """Write tensors to a private folder. Raises RequestError for other values, or a name that comes twice."""
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    found: dict[str, torch.Tensor] = {}
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise _refused("named_tensors", f"must be pairs of a name and a torch.Tensor, got {shown(pairs)}.", pairs)
    for pair in pairs:
        name, tensor = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (pair, None)
        if not isinstance(name, str) or not hasattr(tensor, "untyped_storage"):
            raise _refused("named_tensors", f"must be pairs of a name and a torch.Tensor, got {shown(name)}.", name)
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            kind = "on the meta device" if tensor.is_meta else f"of the layout {tensor.layout}"
            raise _refused("named_tensors", f"must have their values in memory, {name!r} is {kind}.", name)
        if name in found:
            raise _refused("named_tensors", f"has {name!r} twice.", name)
        # a copy: several may share their memory, which a file does not allow
        found[name] = tensor.detach().cpu().clone().contiguous()
    if not found:
        raise _refused("named_tensors", "must be all of the model's tensors, got none.", None)
    from safetensors.torch import save_file

    owned = TemporaryDirectory(prefix="sempre-weights-")
    try:
        save_file(found, Path(owned.name) / "model.safetensors")
    except BaseException:
        owned.cleanup()
        raise
    return NewWeights(owned.name, owned)


def check_running(running: str) -> None:
    """Raise RequestError for another choice."""
    if running not in ("finish", "restart"):
        raise _refused("running", f"must be 'finish' or 'restart', got {shown(running)}.", running)


def _refused(parameter: str, text: str, value: object) -> RequestError:
    return RequestError(f"{parameter} {text}", parameter=parameter, value=value)
