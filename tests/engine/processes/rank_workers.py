"""Ranks of a model of which rank 1, or all, compute something else; SEMPRE_TEST_FAULT says what."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from sempre.ipc.messages import LoadModel, ModelLoaded
from sempre.workers.layers import row_parallel
from sempre.workers.main import main, parse_options
from sempre.workers.worker import Worker

FAULT = os.environ["SEMPRE_TEST_FAULT"]
_sum = row_parallel.sum_partials


class FaultyRank(Worker):
    """Faulty if it is rank 1."""

    def load_model(self, command: LoadModel) -> ModelLoaded:
        if FAULT == "every rank drops a partial":
            row_parallel.sum_partials = lambda partials, w, out: _sum(partials[[0, 0]].contiguous(), w, out)
        if command.config.rank != 1:
            return super().load_model(command)
        if FAULT == "another weight bit in the file":
            with tempfile.TemporaryDirectory() as folder:
                other = _with_another_bit(Path(command.config.model_path), Path(folder) / "model")
                config = msgspec.structs.replace(command.config, model_path=str(other))
                return super().load_model(msgspec.structs.replace(command, config=config))
        loaded = super().load_model(command)
        model = self._require_loaded().model
        match FAULT:
            case "another bit of the last norm in memory":
                norm = model.model.norm.weight
                norm.view(torch.int32)[7] ^= 1 << 18
            case "another hidden state is received":
                link = model.model.input._link
                take = link.take_over
                link.take_over = lambda branch, residual: (take(branch, residual), residual.mul_(1.0001))[0]
            case "a dropped partial":
                row_parallel.sum_partials = lambda partials, w, out: _sum(partials[[1, 1]].contiguous(), w, out)
        return loaded


def _with_another_bit(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, copy / "model.safetensors")
    return copy


if __name__ == "__main__":
    main(lambda: FaultyRank(shared_memory=parse_options().shared_memory))
