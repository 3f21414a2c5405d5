"""Later starts find the kernels of the first one, unless something that decides which they are has changed."""

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
from sempre.workers.backend import ModelOutline  # noqa: E402
from sempre.workers.gpu import variant_record  # noqa: E402
from sempre.workers.gpu.variant_record import read_record, record_key, write_record  # noqa: E402
from sempre.workers.layers.linear_kernel import linear_kernel  # noqa: E402
from sempre.workers.models.registry import load_spec  # noqa: E402

GPU = "an H100, 90"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return tmp_path


@pytest.fixture
def outline() -> ModelOutline:
    folder = Path(checkpoints.__file__).parent / "tiny"
    config = worker_config(folder)
    return ModelOutline(config, load_spec(folder), linear_kernel("invariant"), 256, 64, 2048, 128)


def variants() -> list[Variant]:
    # any function stands for a kernel here
    kernel = SimpleNamespace(module="json", fn=json.loads)
    return [Variant(kernel, '{"a": 1}'), Variant(kernel, '{"a": "2\\n3 ü"}')]


def test_what_was_written_is_read(outline: ModelOutline) -> None:
    key = record_key(outline, GPU)
    assert read_record(key) is None
    write_record(key, variants())
    assert read_record(key) == [Variant(json.loads, variant.specialization) for variant in variants()]


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: "", lambda text: text.replace("2", "3")])
def test_a_damaged_record_is_none_and_is_replaced(outline: ModelOutline, cache: Path, damage) -> None:  # type: ignore[no-untyped-def]
    key = record_key(outline, GPU)
    write_record(key, variants())
    (path,) = (path for path in cache.rglob("variants") if path.is_file())
    path.write_text(damage(path.read_text()))
    assert read_record(key) is None
    write_record(key, variants())
    assert read_record(key) is not None


def test_the_name_follows_all_that_decides(
    outline: ModelOutline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = record_key(outline, GPU)
    config = outline.config
    others = [
        replace(outline, config=msgspec.structs.replace(config, numerics="native")),
        replace(outline, config=msgspec.structs.replace(config, quantization="fp8")),
        replace(outline, spec=replace(outline.spec, head_dim=128)),
        replace(outline, block_size=32),
        replace(outline, max_model_len=128),
    ]
    keys = [key, record_key(outline, "an H200, 90"), *(record_key(other, GPU) for other in others)]
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "other")
        keys.append(record_key(outline, GPU))
    (tmp_path / "kernel.py").write_text("changed")
    with monkeypatch.context() as patch:
        patch.setattr(variant_record, "workers", SimpleNamespace(__path__=[*workers.__path__, tmp_path]))
        keys.append(record_key(outline, GPU))
    assert len(set(keys)) == len(keys)
    same = msgspec.structs.replace(config, seed=7, rank=3, gpu_memory_utilization=0.5)
    assert record_key(replace(outline, config=same), GPU) == key
