"""Later starts find the kernels of the first one, unless something that determines them has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from worker_settings import worker_config

triton = pytest.importorskip("triton")

from sempre import workers  # noqa: E402
from sempre.engine import checkpoints  # noqa: E402
from sempre.kernels.gpu_jit import Variant  # noqa: E402
from sempre.workers.backend import ModelSetup  # noqa: E402
from sempre.workers.gpu import kernel_cache_index  # noqa: E402
from sempre.workers.gpu.kernel_cache_index import index_key, read_index, write_index  # noqa: E402
from sempre.workers.layers.linear_kernel import linear_kernel  # noqa: E402
from sempre.workers.models.registry import load_spec  # noqa: E402

GPU = "an H100, 90"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return tmp_path


@pytest.fixture
def model_setup() -> ModelSetup:
    folder = Path(checkpoints.__file__).parent / "tiny"
    config = worker_config(folder)
    return ModelSetup(config, load_spec(folder), linear_kernel("invariant"), 256, 64, 2048, 128)


def variants() -> list[Variant]:
    # any function can stand in for a kernel here
    kernel = SimpleNamespace(module="json", fn=json.loads)
    return [Variant(kernel, '{"a": 1}'), Variant(kernel, '{"a": "2\\n3 ü"}')]


def test_what_was_written_is_read(model_setup: ModelSetup) -> None:
    key = index_key(model_setup, GPU)
    assert read_index(key) is None
    write_index(key, variants())
    assert read_index(key) == [Variant(json.loads, variant.specialization) for variant in variants()]


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: "", lambda text: text.replace("2", "3")])
def test_a_damaged_index_is_none_and_is_replaced(model_setup: ModelSetup, cache: Path, damage) -> None:  # type: ignore[no-untyped-def]
    key = index_key(model_setup, GPU)
    write_index(key, variants())
    (path,) = (path for path in cache.rglob("variants") if path.is_file())
    path.write_text(damage(path.read_text()))
    assert read_index(key) is None
    write_index(key, variants())
    assert read_index(key) is not None


def test_the_name_depends_on_all_that_decides(
    model_setup: ModelSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = index_key(model_setup, GPU)
    config = model_setup.config
    others = [
        replace(model_setup, config=msgspec.structs.replace(config, numerics="native")),
        replace(model_setup, config=msgspec.structs.replace(config, quantization="fp8")),
        replace(model_setup, spec=replace(model_setup.spec, head_dim=128)),
        replace(model_setup, block_size=32),
        replace(model_setup, max_model_len=128),
    ]
    keys = [key, index_key(model_setup, "an H200, 90"), *(index_key(other, GPU) for other in others)]
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "other")
        keys.append(index_key(model_setup, GPU))
    (tmp_path / "kernel.py").write_text("changed")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache_index, "workers", SimpleNamespace(__path__=[*workers.__path__, tmp_path]))
        keys.append(index_key(model_setup, GPU))
    assert len(set(keys)) == len(keys)
    same = msgspec.structs.replace(config, seed=7, rank=3, gpu_memory_utilization=0.5)
    assert index_key(replace(model_setup, config=same), GPU) == key
