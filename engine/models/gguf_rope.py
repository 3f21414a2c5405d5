"""The rope of a GGUF file: its metadata, and tensors of factors, as fields of a config.json."""

from __future__ import annotations

import math

import numpy as np

from sempre.engine.models.gguf_file import GgufFile
from sempre.ipc.errors import TensorMismatch

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS_OF_ROPE = (_FREQUENCIES, _LONG, _SHORT)
"""tensors that become part of config.json"""


def rope_fields(file: GgufFile, head_dim: int, context_length: int) -> dict[str, object]:
    """Raises ModelError naming the field or the tensor."""
    metadata, arch = file.metadata, file.architecture
    turning = metadata.count(f"{arch}.rope.dimension_count", head_dim, default=head_dim)
    fields: dict[str, object] = {}
    if turning != head_dim:
        if turning % 2 or arch != "phi3":
            metadata.fail(f"{arch}.rope.dimension_count", f"{head_dim}", turning)
        fields["partial_rotary_factor"] = turning / head_dim
    original = metadata.get(f"{arch}.rope.scaling.original_context_length", int) or context_length
    kind = metadata.get(f"{arch}.rope.scaling.type", str) or "none"
    growth = metadata.get(f"{arch}.rope.scaling.attn_factor", float)
    if _LONG in file.tensors or _SHORT in file.tensors:
        if kind not in ("none", "longrope"):
            metadata.fail(f"{arch}.rope.scaling.type", "none or longrope beside tensors of factors", kind)
        long, short = (_factors(file, name, turning // 2) for name in (_LONG, _SHORT))
        scaling: dict[str, object] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        scaling["attention_factor"] = growth or _growth(context_length / original, original)
        return fields | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if _FREQUENCIES in file.tensors:
        # the waves of Llama 3 are stored as the factors that they are longer by
        factors = _factors(file, _FREQUENCIES, turning // 2)
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        metadata.expect(f"{arch}.rope.scaling.type", "none", default="none")
        return fields | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if kind == "none":
        return fields
    factor = metadata.require(f"{arch}.rope.scaling.factor", float)
    if kind == "linear":
        return fields | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        metadata.fail(f"{arch}.rope.scaling.type", "none, linear, yarn, or longrope with its tensors", kind)
    yarn: dict[str, object] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if arch == "gpt-oss":
        yarn["truncate"] = False
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        found = metadata.get(f"{arch}.rope.scaling.{theirs}", float)
        if found is not None:
            yarn[ours] = found
    if growth is not None:
        yarn["attention_factor"] = growth * (1 + 0.1 * math.log(max(factor, 1.0)))
    return fields | {"rope_scaling": yarn}


def _growth(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _factors(file: GgufFile, name: str, count: int) -> list[float]:
    if name not in file.tensors or file.tensors[name].type != "F32" or file.tensors[name].shape != (count,):
        found = file.tensors.get(name)
        shown = "nothing" if found is None else f"{found.type} {found.shape}"
        raise TensorMismatch(
            f"{file.path}: GGUF tensor {name!r}: expected F32 of shape ({count},), found {shown}.",
            tensor=name,
            expected=f"F32 ({count},)",
            found=shown,
        )
    factors = np.frombuffer(file.raw(name), "<f4").astype(float)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise TensorMismatch(
            f"{file.path}: GGUF tensor {name!r}: expected finite factors above 0, found {factors.tolist()}.",
            tensor=name,
            expected="finite factors above 0",
            found=str(factors.tolist()),
        )
    return [float(factor) for factor in factors]
