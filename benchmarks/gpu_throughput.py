"""Speed on one GPU: latency, throughput and prefill of model shapes with random weights, guarantee on.

Metrics, each the median of the repetitions after one warm-up run, of the same workload or its first tokens:
  latency      one request, 128 tokens in and 256 out: milliseconds per output token, prompt included
  throughput   output tokens per second of a batch of requests given at once, wall clock of the whole batch
  requests     seconds for 1,000 short greedy requests given at once
  prefill      prompt tokens per second of 16 prompts of 4,096 tokens, one token out
  startup      seconds from starting a process to its first token: the first time (no kernel cache), and later ones
  graphs       whether requests give the same bits with and without CUDA graphs, in tokens and log-probabilities
Prompts are token ids, the end of sequence is ignored, no prefix cache. Engine in processes (the default) or in this
one (--inproc). With --profile, the kernels of one batch are listed by their time on the device, and their sums compared
with the least bytes and FLOPs that a step needs.

    python benchmarks/gpu_throughput.py --shape qwen3-8b --rows latency batch-64

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient, launch
from sempre.engine.harness import compare_generations, generate, make_request
from sempre.engine.version import __version__
from sempre.ipc.messages import AddRequests, OutputsReady, RequestSpec

if TYPE_CHECKING:
    from roofline import Work

SHAPES = Path(__file__).parent / "shapes"
FIRST_TOKEN = (
    "import sys; sys.argv[1:] = {arguments!r}; from pathlib import Path; sys.path.insert(0, {folder!r});"
    " import gpu_throughput; gpu_throughput.first_token()"
)


def requests(
    count: int, input_len: int, output_len: int, *, temperature: float, seeded: bool = False
) -> list[RequestSpec]:
    """Distinct random prompts; `seeded`: another seed for each."""
    return [
        make_request(
            [1000 + (i * 7919 + j * 104729) % 90000 for j in range(input_len)],
            ordinal=i,
            seed=i if seeded else 0,
            max_tokens=output_len,
            temperature=temperature,
        )
        for i in range(count)
    ]


def short_requests() -> list[RequestSpec]:
    """1,000 prompts of 50 tokens, 90 to 110 tokens out, greedy."""
    prompts = requests(1000, 50, 1, temperature=0.0)
    return [
        make_request(spec.prompt_token_ids, ordinal=spec.ordinal, max_tokens=90 + spec.ordinal % 21, temperature=0.0)
        for spec in prompts
    ]


def run(client: EngineClient, specs: list[RequestSpec]) -> tuple[float, int]:
    """Seconds and output tokens of all requests given at once."""
    began = time.perf_counter()
    client.send(AddRequests(requests=specs))
    unfinished, tokens = len(specs), 0
    while unfinished:
        event = client.receive(300.0)
        if event is None:
            raise TimeoutError(f"{unfinished} requests unfinished after 300 s")
        if isinstance(event, OutputsReady):
            for delta in event.outputs:
                if delta.error is not None:
                    raise RuntimeError(delta.error.message)
                tokens += len(delta.token_ids)
                unfinished -= delta.finish_reason is not None
    return time.perf_counter() - began, tokens


ROWS: dict[str, tuple[str, Callable[[], list[RequestSpec]], Callable[[float, int], float]]] = {
    "latency": ("ms/token", lambda: requests(1, 128, 256, temperature=0.0), lambda s, n: 1000 * s / n),
    "batch-64": ("tok/s", lambda: requests(64, 512, 256, temperature=1.0), lambda s, n: n / s),
    "batch-128": ("tok/s", lambda: requests(128, 512, 256, temperature=1.0), lambda s, n: n / s),
    "batch-256": ("tok/s", lambda: requests(256, 512, 256, temperature=1.0), lambda s, n: n / s),
    "batch-256-seeded": ("tok/s", lambda: requests(256, 512, 256, temperature=1.0, seeded=True), lambda s, n: n / s),
    "requests-1000": ("s", short_requests, lambda s, n: s),
    "prefill": ("tok/s", lambda: requests(16, 4096, 1, temperature=0.0), lambda s, n: 16 * 4096 / s),
}


# rows that start engines of their own
OWN_ENGINES = ("startup", "graphs")
WARM_UP_TOKENS = 8


def shortened(specs: list[RequestSpec]) -> list[RequestSpec]:
    return [
        replace(spec, params=replace(spec.params, max_tokens=min(spec.params.max_tokens, WARM_UP_TOKENS)))
        for spec in specs
    ]


def configuration(args: argparse.Namespace, shape: str) -> dict[str, object]:
    return {
        "model": str(SHAPES / shape),
        "device": "cuda",
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "quantization": args.quantization,
        "multiprocessing": not args.inproc,
        "enforce_eager": args.enforce_eager,
    }


def measure(args: argparse.Namespace, shape: str) -> dict[str, object]:
    """All requested rows, in one engine."""
    began = time.perf_counter()
    client = launch(engine_config(**configuration(args, shape)))  # type: ignore[arg-type]
    ready_s = time.perf_counter() - began
    print(f"{shape}: ready after {ready_s:.2f} s: {client.ready.phase_seconds}", flush=True)
    figures: dict[str, object] = {"ready_s": round(ready_s, 2), "phase_seconds": client.ready.phase_seconds}
    try:
        for name in args.rows:
            if name in OWN_ENGINES:
                continue
            unit, make, figure = ROWS[name]
            specs = make()
            # ragged ends go through many batch sizes, which are captured when first used
            run(client, specs if name == "requests-1000" else shortened(specs))
            values = [figure(*run(client, specs)) for _ in range(args.repetitions)]
            figures[name] = {"median": round(statistics.median(values), 3), "unit": unit, "all": values}
            print(
                f"  {name:17s} {statistics.median(values):10.2f} {unit}   {[round(v, 2) for v in values]}", flush=True
            )
        if args.profile:
            profile(client, shape, Path(args.profile))
    finally:
        client.close()
    figures["fingerprint"] = client.ready.fingerprint
    return figures


def graphs_equal(args: argparse.Namespace, shape: str) -> bool:
    """70 requests at once with CUDA graphs, and the same without, in smaller batches."""
    specs = [
        make_request(
            [1000 + (i * 7919 + j * 104729) % 90000 for j in range(1 + 37 * i % 600)],
            ordinal=i,
            seed=i,
            max_tokens=24,
            temperature=float(i % 2),
            logprobs=2,
        )
        for i in range(70)
    ]
    runs = []
    for changes in ({"enforce_eager": False}, {"enforce_eager": True, "max_num_seqs": 48}):
        client = launch(engine_config(**(configuration(args, shape) | changes)))  # type: ignore[arg-type]
        try:
            runs.append(generate(client, specs))
        finally:
            client.close()
    comparison = compare_generations(*runs)
    print(f"  graphs            {'equal bits' if comparison.equal else comparison.first_difference}", flush=True)
    return comparison.equal


def profile(client: EngineClient, shape: str, folder: Path) -> None:
    """Kernels by device time, prompts and decoding apart, at several batch sizes; needs the engine in this process."""
    # imported here: a start-up is measured without them
    from roofline import work_of
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from sempre.workers.models.registry import load_spec

    folder.mkdir(parents=True, exist_ok=True)
    spec = load_spec(SHAPES / shape)
    lines = []
    for count, input_len, output_len in ((1, 128, 65), (64, 512, 33), (256, 512, 17), (2, 4096, 1)):
        specs = requests(count, input_len, output_len, temperature=1.0)
        run(client, specs)
        with torch_profile(activities=[ProfilerActivity.CUDA]) as result:
            seconds, _ = run(client, specs)
        kernels = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in result.events()
            if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
        )
        lines.append(f"{shape} {count} x {input_len}/{output_len}: {seconds * 1000:.1f} ms wall")
        # every step ends by recording its tokens; steps of one token each follow the last prompt
        ends = [end for _, end, name in kernels if name.startswith("_record_tokens")]
        steps = output_len - 1
        if steps:
            contexts = [input_len + output_len // 2] * count
            work = work_of(spec, count, contexts, logit_rows=count)
            lines += by_time(kernels, ends[-steps - 1], ends[-1], steps, "decode step", work)
        else:
            work = work_of(spec, count * input_len, [input_len] * count, logit_rows=count)
            lines += by_time(kernels, kernels[0][0], ends[-1], 1, "prompts", work)
    (folder / f"{shape}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def by_time(
    kernels: list[tuple[float, float, str]], start: float, end: float, steps: int, what: str, work: list[Work]
) -> list[str]:
    """Time per step of each kernel that ran in [start, end] (us), how long the device was idle, and the floor."""
    from roofline import table

    totals: dict[str, tuple[float, int]] = {}
    busy, reached = 0.0, start
    for began, ended, name in kernels:
        if start <= began and ended <= end:
            seconds, times = totals.get(name, (0.0, 0))
            totals[name] = (seconds + ended - began, times + 1)
            busy += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
    lines = [f"  {what}: {(end - start) / steps:9.1f} us, device busy {busy / steps:9.1f} us"]
    per_step = {name: total / steps for name, (total, _) in totals.items()}
    lines += table(work, per_step, (end - start) / steps)
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    lines += [
        f"    {total / steps:9.1f} us  {times / steps:6.1f} x {total / times:8.2f} us  {name[:90]}"
        for name, (total, times) in ranked[:14]
    ]
    return lines


def first_token() -> None:
    """What `startup` runs in a fresh process; prints when the token arrived, and the phases until then."""
    imported = time.monotonic()
    args = parse()
    client = launch(engine_config(**configuration(args, args.shape[0])))  # type: ignore[arg-type]
    ready = time.monotonic()
    run(client, requests(1, 16, 1, temperature=0.0))
    print(json.dumps({"imported": imported, "ready": ready, "token": time.monotonic(), **client.ready.phase_seconds}))
    client.close()


def startup(args: argparse.Namespace, shape: str, cache: str) -> list[float]:
    """Seconds of each start, the first with an empty kernel cache."""
    arguments = ["--shape", shape, "--max-model-len", str(args.max_model_len)]
    program = FIRST_TOKEN.format(arguments=arguments, folder=str(Path(__file__).parent))
    seconds = []
    for _ in range(1 + args.repetitions):
        # the system's clock is the same in both processes
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            check=True,
            capture_output=True,
            text=True,
        )
        phases: dict[str, float] = json.loads(done.stdout)
        phases |= {name: phases[name] - began for name in ("imported", "ready", "token")}
        seconds.append(phases["token"])
        shown = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
        print(f"  startup {shape}: {seconds[-1]:.2f} s ({shown})", flush=True)
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["qwen3-0.6b", "qwen3-8b", "llama-3.1-8b"])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, *OWN_ENGINES], choices=[*ROWS, *OWN_ENGINES])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=4608)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--quantization", help="the engine's setting")
    parser.add_argument("--inproc", action="store_true", help="no processes")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--profile", help="folder for lists of kernels by time (implies --inproc)")
    args = parser.parse_args()
    args.inproc = args.inproc or args.profile is not None
    return args


def commit() -> str:
    """Of the measured tree; with + when it has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False, cwd=SHAPES
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    import tempfile

    args = parse()
    report: dict[str, object] = {"benchmark": "gpu_throughput", "version": __version__, "machine": platform.machine()}
    report |= {"commit": commit(), "command": sys.argv, "arguments": vars(args)}
    for shape in args.shape:
        figures = measure(args, shape) if args.profile or set(args.rows) - set(OWN_ENGINES) else {}
        if "graphs" in args.rows:
            figures["graphs_equal"] = graphs_equal(args, shape)
        if "startup" in args.rows:
            with tempfile.TemporaryDirectory() as cache:
                first, *later = (round(s, 2) for s in startup(args, shape, cache))
            figures["startup_s"] = {"first": first, "later_median": statistics.median(later), "later": later}
        report[shape] = figures
    for name, value in report.get(args.shape[0], {}).get("fingerprint", {}).items():  # type: ignore[attr-defined]
        print(f"{name:13s} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
