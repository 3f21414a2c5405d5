"""Every planted fault is noticed by the tests it names.

`pytest -m mutants` plants each fault of `planted_faults` in a copy of the project and runs its killers there: each of
them must fail, by an assertion of its own or an error that the project raises. In the copy without faults all of them
pass. The plain run checks only that every fault still fits its file and that its killers belong to the plain run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from planted_faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("engine", "workers", "ipc", "kernels", "tests", ".typing", "setup.cfg")
SECONDS = 900
KILLERS = sorted({killer for fault in FAULTS for killer in fault.killers})
# where there is a GPU, its kernels are not interpreted
INTERPRETED = "tests/kernels/interpreter/"
# how the message of a test that noticed something begins; one that cannot run fails with other errors
NOTICED = (
    "assert ",
    "AssertionError",
    "Failed: DID NOT RAISE",
    "BaseExceptionGroup: Hypothesis found",
    "ExceptionGroup: Hypothesis found",
    "sempre.ipc.errors.",
    "IndexError",
    "struct.error",
)


class Outcome(NamedTuple):
    """The results of one run; `failed` has the tests' messages."""

    num_passed: int
    failed: list[str]
    broken: list[str]
    """what was skipped, or failed outside of a test"""
    output: str


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def environment(folder: Path, cache: Path | None = None) -> dict[str, str]:
    """An environment in which the packages of `folder` are found before the installed ones."""
    settings = {"PYTHONPATH": str(folder / ".typing")} | ({"SEMPRE_CACHE": str(cache)} if cache else {})
    return {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"} | settings


def run(folder: Path, nodes: list[str], scratch: Path, cache: Path | None = None) -> Outcome:
    """Run tests of a copy up to the first failure."""
    report = scratch / "report.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        pytest_command("-x", f"--junitxml={report}", *nodes),
        cwd=folder,
        env=environment(folder, cache),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    output = done.stdout[-3000:] + done.stderr[-1000:]
    if not report.exists():
        return Outcome(0, [], [f"pytest ended with {done.returncode}"], output)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [part.get("message", "") for case in cases for part in case.findall("failure")]
    broken = [part.get("message", "") for case in cases for part in (*case.findall("error"), *case.findall("skipped"))]
    return Outcome(sum(not len(case) for case in cases), failed, broken, output)


def is_noticed(outcome: Outcome) -> bool:
    """Whether a test has run and found something wrong, and nothing else happened."""
    return bool(outcome.failed) and not outcome.broken and all(text.startswith(NOTICED) for text in outcome.failed)


@contextmanager
def planted(project: Path, fault: Fault) -> Iterator[None]:
    """In this context, the copy has the fault."""
    path = project / fault.file
    right = path.read_text(encoding="utf-8")
    assert right.count(fault.before) == 1
    try:
        write(path, right.replace(fault.before, fault.after))
        yield
    finally:
        write(path, right)


def write(path: Path, text: str) -> None:
    """Python considers a compiled file current when size and second are the same."""
    path.write_text(text, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project."""
    folder = tmp_path_factory.mktemp("mutants") / "project"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_its_file(fault: Fault) -> None:
    found = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.before)
    assert found == 1, f"{fault.before!r} appears {found} times in {fault.file}; fit planted_faults to the current text"
    assert fault.before != fault.after
    assert fault.killers


def test_there_are_faults_of_every_kind() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 40
    assert {fault.file.split("/")[0] for fault in FAULTS} == {"engine", "workers", "kernels", "ipc"}
    assert sum(fault.changes_cpu_kernels for fault in FAULTS) >= 8


def collected(*arguments: str) -> list[str]:
    """Node ids of the tests that are selected by default."""
    command = pytest_command("--collect-only", *arguments)
    done = subprocess.run(command, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout.splitlines()


def missing(nodes: Iterable[str]) -> list[str]:
    """Killers that are not among these tests."""
    found = {name for node in nodes for name in (node, node.partition("[")[0])}
    return [killer for killer in KILLERS if killer not in found]


def test_the_killers_belong_to_the_plain_run(request: pytest.FixtureRequest) -> None:
    """They are all in the run that this test is part of, or else they are collected."""
    nodes = [item.nodeid for item in request.session.items]
    nodes += collected(*sorted({killer.partition("::")[0] for killer in missing(nodes)})) if missing(nodes) else []
    assert missing(nodes) == []


def can_run(killer: str) -> bool:
    return not (killer.startswith(INTERPRETED) and torch.cuda.is_available())


@pytest.mark.mutants
@pytest.mark.timeout(SECONDS)
def test_the_killers_pass_without_a_fault(project: Path, tmp_path: Path) -> None:
    killers = [killer for killer in KILLERS if can_run(killer)]
    outcome = run(project, killers, tmp_path)
    assert (outcome.failed, outcome.broken) == ([], []), outcome.output
    assert outcome.num_passed >= len(killers)


@pytest.mark.mutants
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def find_cached_blocks(self, request", "def find_cached_blocks(self, (request"),
        ("import BlockKey, PrefixCache", "import BlockKey, NoSuchName"),
        ("block = self._prefix_cache.find(key)", "block = self._prefix_cache.find(no_such_name)"),
    ],
)
def test_control_code_that_does_not_run_is_not_noticed(project: Path, tmp_path: Path, before: str, after: str) -> None:
    killer = "tests/engine/scheduling/test_scheduler.py::test_the_last_token_is_always_computed"
    fault = Fault("broken", "", "engine/scheduling/kv_cache_manager.py", before, after, (killer,))
    with planted(project, fault):
        assert not is_noticed(run(project, [killer], tmp_path))


@pytest.mark.mutants
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_noticed(fault: Fault, project: Path, tmp_path: Path) -> None:
    if not all(map(can_run, fault.killers)):
        pytest.skip("this machine has a GPU: its kernels are not interpreted")
    # kernels are cached by a digest of their sources: faulty ones would stay in the user's cache forever
    cache = tmp_path / "cache" if fault.changes_cpu_kernels else None
    with planted(project, fault):
        for killer in fault.killers:
            outcome = run(project, [killer], tmp_path, cache)
            assert is_noticed(outcome), f"{killer}: {outcome.failed} {outcome.broken}\n{outcome.output}"
