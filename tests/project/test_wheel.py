"""What is installed: every module and data file of the tree, and `sempre` itself, in each way of installing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "workers", "ipc", "kernels")
# becomes the package `sempre`, above all others
ABOVE = "engine/namespace/"

# without site: what is installed for the tests is not seen; a finder of the same name beside the libraries comes later
PROBE = """
import site, sys
sys.path[1:] = sys.argv[1:]
site.addsitedir(sys.argv[1])
from sempre import LLM, SamplingParams, __version__
import sempre, sempre.engine, sempre.ipc.errors, sempre.workers, sempre.kernels.threads
assert LLM is sempre.LLM is sempre.engine.LLM
names = {}
exec("from sempre import *", names)
assert set(sempre.engine.__all__) <= set(names) and set(sempre.engine.__all__) <= set(dir(sempre))
try:
    sempre.no_such_name
except AttributeError as error:
    print(error)
print(sempre.__file__, "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which no earlier build has been in."""
    tree = tmp_path_factory.mktemp("install") / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*PACKAGES, ".typing"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, symlinks=True)
    return tree


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    [wheel] = folder.glob("sempre-*.whl")
    return wheel


def probe(site_packages: Path) -> Path:
    """Where `sempre` comes from when only this folder is added to the libraries."""
    ours = (ROOT / "tests", ROOT / ".typing")
    libraries = [path for path in sys.path if Path(path).is_dir() and not any(map(Path(path).is_relative_to, ours))]
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(site_packages), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=site_packages)
    assert done.returncode == 0, done.stderr
    message, found = done.stdout.splitlines()
    assert message == "module 'sempre' has no attribute 'no_such_name'"
    file, has_torch = found.split()
    assert has_torch == "False"
    return Path(file)


def expected_files() -> set[str]:
    expected = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in relative:
                expected.add(f"sempre/{relative.removeprefix(ABOVE)}")
    return expected


def test_wheel_holds_every_module_and_checkpoint(tree: Path, tmp_path: Path) -> None:
    wheel = build_wheel(tree, tmp_path)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
        archive.extractall(installed)
    assert found == expected_files()
    assert probe(installed) == installed / "sempre" / "__init__.py"


@pytest.mark.product
def test_the_source_archive_gives_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, timeout=200, check=True)
    [archive] = tmp_path.glob("sempre-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    wheel = build_wheel(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    with zipfile.ZipFile(wheel) as built:
        assert {n for n in built.namelist() if ".dist-info/" not in n} == expected_files()


def install_editable(tree: Path, prefix: Path) -> Path:
    """Return the folder of libraries that the install has written to."""
    pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", prefix, "-e", tree)
    paths = sysconfig.get_paths(vars={"base": str(prefix), "platbase": str(prefix)})
    return Path(paths["purelib"])


def test_an_editable_install_finds_the_tree(tree: Path, tmp_path: Path) -> None:
    site_packages = install_editable(tree, tmp_path)
    assert os.listdir(site_packages)
    assert probe(site_packages) == tree / ".typing/sempre/__init__.py"


def install_wheel(tree: Path, prefix: Path) -> Path:
    pip("install", "--no-deps", "--ignore-installed", "--prefix", prefix, build_wheel(tree, prefix))
    return Path(sysconfig.get_paths(vars={"base": str(prefix), "platbase": str(prefix)})["purelib"])


SCRIPT = """\
import sempre
from sempre import LLM, RequestOutput, SamplingParams

params = SamplingParams(max_tokens=8, seed=1)


def ids(llm: LLM) -> list[int]:
    outputs: list[RequestOutput] = llm.generate(["a"], params)
    return list(outputs[0].outputs[0].token_ids)


version: str = sempre.__version__
"""
WRONG = (
    SCRIPT
    + """
SamplingParams(max_tokns=8)
LLM("tiny", max_num_seqs=4).generat("a")
number: int = sempre.__version__
"""
)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(tree: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment with this install and the libraries of the one that runs the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    install = {"wheel": install_wheel, "editable": install_editable}[request.param]
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (install(tree, folder) / "zz_libraries.pth").write_text("\n".join(libraries))
    return folder / "bin" / "python"


@pytest.mark.product
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_the_install(python: Path, checker: str, tmp_path: Path) -> None:
    pytest.importorskip(checker, reason=f"{checker} is not installed")
    option = {"mypy": ["--strict", "--python-executable"], "pyright": ["--pythonpath"]}[checker]
    found = []
    for name, source in (("right.py", SCRIPT), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(source)
        command = [sys.executable, "-m", checker, *option, str(python), name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        found.append([line for line in done.stdout.splitlines() if "error" in line and name in line])
        assert (done.returncode == 0) == (name == "right.py"), done.stdout + done.stderr
    assert found[0] == []
    for part in ("max_tokns", "generat", "int"):
        assert any(part in line for line in found[1]), (part, found[1])
