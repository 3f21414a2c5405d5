"""Start to ready: seconds from `LLM(...)` until it can be used, and from process start, beyond importing torch.

Metric: in a fresh interpreter, the wall clock of constructing `LLM(model)`, minus that of `import torch` in another
fresh interpreter (a worker has to import it anyway). Median of the repetitions; kernels are compiled at the very first
start on a machine and cached, which is reported apart with --cold (an empty kernel cache).

    python benchmarks/startup.py --model tiny
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

from sempre.engine.version import __version__

START = (
    "import time, sys; began = time.perf_counter()\n"
    "from sempre.engine import LLM\n"
    "llm = LLM(sys.argv[1]); print(time.perf_counter() - began); llm.shutdown()"
)
IMPORT = "import time; began = time.perf_counter(); import torch; print(time.perf_counter() - began)"


def _seconds(program: str, *arguments: str, environment: dict[str, str] | None = None) -> float:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | (environment or {}),
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also start once with an empty kernel cache")
    args = parser.parse_args()
    _seconds(START, args.model)
    starts, imports = [], []
    for _ in range(args.repetitions):
        starts.append(_seconds(START, args.model))
        imports.append(_seconds(IMPORT))
    ready, torch_import = statistics.median(starts), statistics.median(imports)
    report = {
        "benchmark": "startup",
        "model": args.model,
        "start_to_ready_s": round(ready, 2),
        "import_torch_s": round(torch_import, 2),
        "beyond_importing_torch_s": round(ready - torch_import, 2),
        "machine": platform.machine(),
        "version": __version__,
    }
    if args.cold:
        with tempfile.TemporaryDirectory() as empty:
            report["first_start_s"] = round(_seconds(START, args.model, environment={"SEMPRE_CACHE": empty}), 2)
    for name, value in report.items():
        print(f"{name:28s} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
