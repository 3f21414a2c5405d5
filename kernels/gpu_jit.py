"""How the GPU kernels are compiled: Triton, without fused multiply-adds of the compiler's own choice.

Imported only by the GPU modules, so that a machine without Triton can use the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

Kernel = Callable[..., Any]

# whether a product and a sum become one rounding or two must not depend on the tile around them
EXACT = {"enable_fp_fusion": False}


def jit(*, runtime: tuple[str, ...] = ()) -> Callable[[Kernel], Any]:
    """Decorator: a Triton kernel. Arguments named in `runtime` never select another compiled variant."""

    def decorate(function: Kernel) -> Any:
        # the compiler evaluates the annotations of arguments, and lets them name constants only
        function.__globals__["Any"] = tl.constexpr(None)
        return triton.jit(function, do_not_specialize=list(runtime))

    return decorate


@cache
def architecture(device: torch.device) -> str:
    """`sm_90` and the like; "any" where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
