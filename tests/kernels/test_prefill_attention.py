"""The kernel for long prompts needs no GPU to be compiled: the worker's way of collecting and compiling reaches it."""

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
from sempre.kernels.attention import HeadLayout, PagedBatch, ScoreParams, gpu, gpu_prefill
from sempre.kernels.gpu_jit import collecting, compile_described
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
heads, cpu = HeadLayout(8, 2, 64), torch.device("cpu")
qkv = torch.zeros(2048, heads.qkv_width, dtype=torch.bfloat16)
cache = gpu.allocate_kv_cache(32, 2, 64, 64, torch.bfloat16, cpu)
index = lambda *values: torch.tensor(values, dtype=torch.int32)
batch = PagedBatch(index(*range(32))[None], index(0, 2048), index(2048), 2048, 2048)
out, workspace = torch.empty(2048, 8 * 64, dtype=torch.bfloat16), gpu.allocate_attention_workspace(8, 64, 2048, cpu)
with collecting() as collection:
    gpu_prefill.paged_attention(qkv, cache, batch, heads, ScoreParams(0.125), out, workspace)
variant, = collection.variants
before = variant.is_on_disk()
compile_described(variant.describe(), launcher=False)
print(json.dumps([before, variant.is_on_disk()]))
"""


def test_it_compiles_for_hopper_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [False, True]
