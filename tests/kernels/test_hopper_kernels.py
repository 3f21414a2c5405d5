"""Kernels for Hopper need no GPU to be compiled: the worker's way of collecting and compiling reaches them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
import torch
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sempre.workers.gpu.compiler_main import TargetOnly
driver.set_active(TargetOnly(GPUTarget("cuda", 90, 32)))
from sempre.kernels.gpu_jit import collecting, compile_described
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
{inputs}
with collecting() as collection:
    {launch}
variant, = collection.variants
before = variant.is_on_disk()
compile_described(variant.describe(), launcher=False)
print(json.dumps([before, variant.is_on_disk()]))
"""
ATTENTION = """
from sempre.kernels.attention import HeadLayout, PagedBatch, ScoreParams, gpu, gpu_decode, gpu_prefill
heads, cpu = HeadLayout(8, 2, 64), torch.device("cpu")
qkv = torch.zeros(2048, heads.qkv_width, dtype=torch.bfloat16)
cache = gpu.allocate_kv_cache(32, 2, 64, 64, torch.bfloat16, cpu)
index = lambda *values: torch.tensor(values, dtype=torch.int32)
batch = PagedBatch(index(*range(32))[None], index(0, 2048), index(2048), 2048, 2048)
out, workspace = torch.empty(2048, 8 * 64, dtype=torch.bfloat16), gpu.allocate_attention_workspace(8, 64, 2048, cpu)
arguments = qkv, cache, batch, heads, ScoreParams(0.125), out, workspace
"""
LINEAR = """
from sempre.kernels.fp8 import FP8, Fp8Scheme
from sempre.kernels.linear.gpu_fp8 import run_warps
from sempre.kernels.linear.gpu_table import Warps
from sempre.kernels.linear.weights import GpuLinearWeight
x, values = (torch.zeros(rows, 256, dtype=torch.uint8).view(FP8) for rows in (1000, 512))
weight = GpuLinearWeight(values, None, scale=torch.ones(512), scheme=Fp8Scheme.WEIGHTS_AND_ACTIVATIONS)
out = torch.empty(1000, 512, dtype=torch.bfloat16)
"""
CASES = {
    "prefill": (ATTENTION, "gpu_prefill.paged_attention(*arguments)"),
    "decode": (ATTENTION, "gpu_decode.paged_attention(*arguments)"),
    "fp8": (LINEAR, "run_warps(x, torch.ones(1000), weight, out, Warps(256, 128, 4))"),
}


@pytest.mark.product
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_for_hopper_without_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, launch = CASES[name]
    program = PROGRAM.format(inputs=inputs, launch=launch)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [False, True]
