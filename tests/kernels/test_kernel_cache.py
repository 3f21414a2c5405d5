"""Kernels on disk that are damaged, another user's, or unwritable: compiled again, logged once, never unpickled."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sempre.kernels import kernel_cache
from sempre.kernels.kernel_cache import KernelFiles, private_folder

KEY = ("int64(int64)", ("x86_64", "znver4"))
DATA = {"code": b"\x90" * 4096}
PROBE = (
    "import numpy as np; from sempre.kernels.jit import address_of; a = np.zeros(4);"
    "print(address_of(a) == a.ctypes.data)"
)


class Detonator:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._path,)


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": become_folder,
    "another user's": give_away,
}


@pytest.fixture(autouse=True)
def _not_yet_warned() -> Iterator[None]:
    kernel_cache.warn_once.cache_clear()
    yield
    kernel_cache.warn_once.cache_clear()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    files = KernelFiles(tmp_path, "linear")
    assert files.load(KEY) is None
    files.save(KEY, DATA)
    assert files.load(KEY) == DATA
    assert not caplog.records
    (path,) = tmp_path.iterdir()
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert files.load(KEY) is None
        assert files.load(KEY) is None
    assert len(caplog.records) == 1, "said once"
    files.save(KEY, DATA)
    assert files.load(KEY) == DATA
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_unpickled_without_its_digest(tmp_path: Path) -> None:
    files, trace = KernelFiles(tmp_path, "linear"), tmp_path / "trace"
    files.save(KEY, DATA)
    (path,) = tmp_path.iterdir()
    bomb = pickle.dumps(Detonator(trace))
    path.write_bytes(path.read_bytes()[:32] + bomb)
    assert files.load(KEY) is None
    assert not trace.exists()
    # the control: with its digest it is unpickled
    path.write_bytes(hashlib.sha256(bomb).digest() + bomb)
    files.load(KEY)
    assert trace.exists()


def test_many_writers_leave_a_whole_file(tmp_path: Path) -> None:
    files = KernelFiles(tmp_path, "linear")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: files.save(KEY, DATA), range(40)))
        assert all(found == DATA for found in pool.map(lambda _: files.load(KEY), range(8)))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "kernels" / "digest")
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert private_folder(link) is None
    (tmp_path / "file").write_text("")
    assert private_folder(tmp_path / "file") is None
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        assert private_folder(folder) is None


def run_probe(cache: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def bound_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | {"SEMPRE_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=200,
        preexec_fn=bound_files,
    )  # fmt: skip


def test_a_start_with_a_full_disk_and_then_with_damage(tmp_path: Path) -> None:
    done = run_probe(tmp_path, limit=1024)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("cannot be kept") == 1
    assert list(tmp_path.rglob("*.kernel")) == []
    assert run_probe(tmp_path).stderr == ""
    (path,) = tmp_path.rglob("*.kernel")
    whole = path.read_bytes()
    flip(path)
    done = run_probe(tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("damaged") == 1
    assert len(path.read_bytes()) == len(whole)
