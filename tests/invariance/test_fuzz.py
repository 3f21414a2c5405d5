"""Random lives of an engine: requests arrive, wait beside others, are aborted, paused, preempted, drafted for, adapted,
quantised and shared between processes, and processes are killed. See `lives` for what must hold.

The plain run draws the same lives each time. SEMPRE_FUZZ_SECONDS=3600 looks for new ones that long. A life that fails
is shrunk and kept in `lives/`, where every later run lives it again: commit it with what mends it.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from lives import Life, lives, run, shrunk

SECONDS = float(os.environ.get("SEMPRE_FUZZ_SECONDS", "0"))
# each is a life, which takes a second or a few
NUM_TRIES = 500 if SECONDS else 50
FOLDER = Path(__file__).parent / "lives"
# how many lives of each kind are drawn
NUM_LIVES = {"plain": 5, "drafts": 6, "adapters": 5, "formats": 2, "processes": 3}
# failing lives are shrunk by `shrunk`, which stops after a number of tries
DRAWN = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def look(kind: str, folder: Path = FOLDER, number: int | None = None) -> None:
    """Run random lives; keep the smallest form of one that fails. `number`: others than those of the plain run."""
    failed: list[Life] = []

    def run_and_note(life: Life) -> None:
        try:
            run(life)
        except Exception:
            failed.append(life)
            raise

    check = given(lives(kind))(run_and_note)
    check = settings(DRAWN, max_examples=NUM_LIVES.get(kind, 1), derandomize=number is None)(check)
    try:
        (check if number is None else seed(number)(check))()
    except Exception as error:
        if failed:
            error.add_note(f"kept as {keep(shrunk(failed[0], NUM_TRIES), folder)}")
        raise


def keep(life: Life, folder: Path) -> Path:
    """Write a life to a file of its own."""
    text = life.to_json()
    folder.mkdir(exist_ok=True)
    path = folder / f"found-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_kept_lives(path: Path) -> None:
    run(Life.from_json(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.product] * (kind == "processes")) for kind in NUM_LIVES]
)
def test_random_lives(kind: str) -> None:
    look(kind)


def test_the_ordinary_matmul_is_noticed_and_the_life_is_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="template ") as caught:
        look("control", tmp_path / "lives")
    [path] = (tmp_path / "lives").glob("found-*.json")
    assert caught.value.__notes__[-1] == f"kept as {path}"
    life = Life.from_json(path.read_text(encoding="utf-8"))
    # one request among others, or cut into chunks, is enough
    assert len(life.events) <= 2
    with pytest.raises(AssertionError, match="template "):
        run(life)


@pytest.mark.skipif(not SECONDS, reason="SEMPRE_FUZZ_SECONDS says how long to look for new lives")
@pytest.mark.timeout(2 * SECONDS + 3600)
def test_new_lives() -> None:
    end, number = time.monotonic() + SECONDS, int(time.time())
    while time.monotonic() < end:
        for kind in NUM_LIVES:
            number += 1
            print(f"{kind}, seed {number}")
            look(kind, number=number)
