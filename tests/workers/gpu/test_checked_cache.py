"""Triton's cache folder: damaged files count as absent, and a read-only disk is no reason to fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.runtime.cache import get_cache_manager, get_override_manager  # noqa: E402

from sempre.kernels import gpu_cache, gpu_jit  # noqa: E402
from sempre.kernels.gpu_cache import CheckedCache  # noqa: E402

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gpu_cache._warn_once.cache_clear()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill() -> dict[str, str]:
    manager = get_cache_manager(KEY)
    assert gpu_jit
    assert isinstance(manager, CheckedCache)
    group = {"k.cubin": manager.put(b"\x7fELF" * 100, "k.cubin"), "k.json": manager.put("{}", "k.json", binary=False)}
    manager.put_group("k.json", group)
    return group


def test_what_was_put_is_found(caplog: pytest.LogCaptureFixture) -> None:
    group = fill()
    assert get_cache_manager(KEY).get_group("k.json") == group
    assert get_cache_manager(KEY).get_file("k.cubin") == group["k.cubin"]
    assert get_cache_manager("cd" * 32).get_group("k.json") is None
    assert not caplog.records


@pytest.mark.parametrize("name", ["k.cubin", "k.json", "__grp__k.json", "k.cubin.sha256"])
@pytest.mark.parametrize("damage", ["empty", "half", "one bit", "gone"])
def test_damage_is_a_miss(name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(fill()["k.cubin"]).with_name(name)
    contents = path.read_bytes()
    middle = len(contents) // 2
    if damage == "gone":
        path.unlink()
    else:
        flipped = contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]
        path.write_bytes({"empty": b"", "half": contents[:middle], "one bit": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        assert get_cache_manager(KEY).get_group("k.json") is None
        assert get_cache_manager(KEY).get_group("k.json") is None
    assert len(caplog.records) == (damage != "gone")
    assert get_cache_manager(KEY).get_group("k.json") is None
    group = fill()
    assert get_cache_manager(KEY).get_group("k.json") == group


def test_without_a_writable_folder_kernels_live_as_long_as_the_process(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        group = fill()
    assert all(Path(path).exists() for path in group.values())
    assert not Path(group["k.cubin"]).is_relative_to(folder)
    assert caplog.records


def test_files_that_a_developer_puts_by_hand_need_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "override_dir", str(tmp_path / "override"))
    manager = get_override_manager(KEY)
    Path(manager.cache_dir).mkdir(parents=True)
    path = Path(manager.cache_dir) / "k.ptx"
    path.write_text("")
    assert manager.get_file("k.ptx") == str(path)
