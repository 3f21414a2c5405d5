"""Which formats a model's matrices have: by its checkpoint, the engine's settings, and what the device computes."""

from __future__ import annotations

from pathlib import Path

import torch

from sempre.ipc.config import WorkerConfig
from sempre.kernels.integers import IntegerScheme
from sempre.workers.layers.vocabulary import EMBEDDING
from sempre.workers.models.config import ModelSpec
from sempre.workers.quantization.coded import (
    ONLINE_FORMS,
    CodedQuantization,
    OnlineCodedQuantization,
    coded_matrices,
)
from sempre.workers.quantization.coded_integers import coded_integer_quantization
from sempre.workers.quantization.config import IntegerSpec, Mxfp4Spec, StoredQuantization
from sempre.workers.quantization.fp8 import Fp8Quantization
from sempre.workers.quantization.integers import check_integers, integer_quantization
from sempre.workers.quantization.method import Quantization
from sempre.workers.quantization.mxfp4 import Mxfp4Quantization
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.quantization.widened import CodedFormat, WidenedFormat, WidenedSource, WidenedSpec, form_of
from sempre.workers.tensor_source import FLOAT_NAMES, TensorSource, open_safetensors


def formats_of(
    resolved: StoredQuantization | IntegerSpec | None,
    spec: ModelSpec,
    config: WorkerConfig,
    device: torch.device,
    *,
    packs: bool,
) -> Quantization:
    """The formats of a model's matrices; `packs`: whether those of few bits stay packed. Raises ConfigError for
    integers where they are not computed."""
    match resolved:
        case IntegerSpec():
            return _integers(resolved, config, device, packs=packs)
        case None | WidenedSpec():
            stated = spec.quantization.format if isinstance(spec.quantization, WidenedSpec) else None
            form = form_of(stated)
            if not packs or form is None:
                return NotQuantized()
            if config.load_format == "dummy":
                return OnlineCodedQuantization(form)
            assert isinstance(stated, CodedFormat)
            return _codes(stated, spec, config)
        case Mxfp4Spec():
            return Mxfp4Quantization(resolved)
        case _:
            return Fp8Quantization(resolved)


def _integers(resolved: IntegerSpec, config: WorkerConfig, device: torch.device, *, packs: bool) -> Quantization:
    if packs and resolved.scheme in ONLINE_FORMS:
        return OnlineCodedQuantization(ONLINE_FORMS[resolved.scheme])
    check_integers(resolved.scheme, config, device)
    form = resolved.format
    if resolved.scheme is IntegerScheme.STORED and isinstance(form, CodedFormat):
        with open_safetensors(Path(config.model_path)) as opened:
            return coded_integer_quantization(WidenedSource(opened, form), form)
    return integer_quantization(resolved.scheme, config)


def _codes(form: CodedFormat, spec: ModelSpec, config: WorkerConfig) -> Quantization:
    """Codes, where kernels read them for the engine's dtype."""
    with open_safetensors(Path(config.model_path)) as opened:
        source = WidenedSource(opened, form)
        if config.dtype == "auto" and spec.checkpoint_dtype is None and EMBEDDING not in source.names():
            return NotQuantized()
        return CodedQuantization(coded_matrices(source, form, target_dtype(spec, source, config.dtype)))


def stored_format(resolved: StoredQuantization | IntegerSpec | None) -> WidenedFormat | None:
    """The format of those matrices that are not read as they are stored."""
    return resolved.format if isinstance(resolved, WidenedSpec | IntegerSpec) else None


def target_dtype(spec: ModelSpec, source: TensorSource, dtype: str) -> torch.dtype:
    """`dtype`, with auto resolved."""
    name = dtype if dtype != "auto" else spec.checkpoint_dtype
    return FLOAT_NAMES[source.dtype_name(EMBEDDING)] if name is None else getattr(torch, name)
