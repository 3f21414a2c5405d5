"""No decision reads the clock of the system, which may jump: time is measured with a clock that only goes forward."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("ipc", "workers", "kernels", "engine/coordinator", "engine/executor", "engine/scheduling", "engine/client")
WALL_CLOCK = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\(|from time import .*\btime\b")
# a time of day that is told to others
TOLD = {"engine/coordinator/kv_event_publisher.py", "engine/executor/node_facts.py"}


def test_time_is_measured_with_a_clock_that_only_goes_forward() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)) for file in files if WALL_CLOCK.search(file.read_text())}
    assert found == TOLD


def test_the_pattern_finds_the_wall_clock() -> None:
    for line in ("now = time.time()", "time.time_ns()", "datetime.now(tz)", "from time import sleep, time"):
        assert WALL_CLOCK.search(line), line
    for line in ("time.monotonic()", "perf_counter()", "from time import perf_counter"):
        assert not WALL_CLOCK.search(line), line
