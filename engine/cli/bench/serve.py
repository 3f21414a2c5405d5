"""`sempre bench serve`: load test of a server, with the flags, definitions and keys of `vllm bench serve`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sempre.engine.cli.arguments import json_object
from sempre.engine.cli.bench.plot import check_plot_name, write_plot
from sempre.engine.cli.bench.tables import sweep_table
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import (
    add_certificate_flags,
    base_url,
    certificate_check,
    connect,
    headers_for,
)
from sempre.ipc.errors import SempreError, ServerError
from sempre.ipc.log_lines import plain

if TYPE_CHECKING:
    from sempre.engine.cli.bench.load import Endpoint

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
# `vllm` and `sempre` are other names of `openai`.
_ENDPOINTS = {"openai": _COMPLETIONS, "vllm": _COMPLETIONS, "sempre": _COMPLETIONS, "openai-chat": _CHAT}
_SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}
_METRICS = ("ttft", "tpot", "itl", "e2el")
_GOODPUT = ("ttft", "tpot", "e2el")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    _add_server_flags(parser.add_argument_group("server"))
    _add_load_flags(parser.add_argument_group("load"))
    _add_result_flags(parser.add_argument_group("result"))
    sampling = parser.add_argument_group("sampling", "The defaults are the server's.")
    for name, kind in _SAMPLING.items():
        sampling.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X")
    sampling.add_argument("--logprobs", type=int, metavar="N", help="alternatives to report with each token")
    sampling.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="always generate the full output length (default: with random prompts)",
    )
    sampling.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="more request fields")


def _add_server_flags(group: Any) -> None:
    group.add_argument("--backend", choices=_ENDPOINTS, default="openai", help="interface (default: openai)")
    group.add_argument("--base-url", metavar="URL", help="address, instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", metavar="TEXT", help="default: 127.0.0.1")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    group.add_argument("--endpoint", metavar="PATH", help="default: the backend's")
    group.add_argument("--model", metavar="MODEL", help="default: the first served model")
    group.add_argument("--served-model-name", metavar="TEXT", help="name in requests, if it differs from MODEL")
    group.add_argument("--tokenizer", metavar="MODEL", help="default: the model's, from this machine")
    group.add_argument("--api-key", metavar="KEY", help="default: $SEMPRE_API_KEY or $OPENAI_API_KEY")
    add_certificate_flags(group)
    group.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="more request headers")
    group.add_argument(
        "--ready-check-timeout-sec", type=float, default=0.0, metavar="X", help="seconds to wait for it (default: 0)"
    )


def _add_load_flags(group: Any) -> None:
    def integer(flag: str, default: int | None, text: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, type=int, default=default, metavar="N", help=text + shown)

    group.add_argument("--dataset-name", choices=("random", "sharegpt"), default="random", help="default: random")
    group.add_argument("--dataset-path", metavar="FILE", help="file of the dataset sharegpt")
    integer("--num-prompts", 1000, "total requests")
    rates: dict[str, Any] = {"type": _listed(float), "default": [math.inf], "metavar": "X,…"}
    group.add_argument("--request-rate", **rates, help="per second; several are measured in turn (default: inf)")
    group.add_argument("--burstiness", type=float, default=1.0, metavar="X", help="1 is Poisson, less in bursts")
    limits: dict[str, Any] = {"type": _listed(int), "default": [None], "metavar": "N,…"}
    group.add_argument("--max-concurrency", **limits, help="concurrent requests; several are measured in turn")
    group.add_argument(
        "--request-timeout",
        type=float,
        default=3600.0,
        metavar="X",
        help="seconds from sending a request to its last byte (default: 3600)",
    )
    integer("--num-warmups", 0, "warm-up requests that do not count")
    integer("--random-input-len", 1024, "tokens of a random prompt")
    integer("--random-output-len", 128, "tokens generated from it")
    group.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X", help="both lengths vary by ± X")
    integer("--random-prefix-len", 0, "tokens at the start shared by all random prompts")
    integer("--sharegpt-output-len", None, "tokens generated from a conversation; default: the length of its answer")
    integer("--input-len", None, "the same as --random-input-len")
    integer("--output-len", None, "the same as --random-output-len or --sharegpt-output-len")
    integer("--seed", 0, "seed of prompts and arrival times")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_result_flags(group: Any) -> None:
    group.add_argument("--save-result", action="store_true", help="write the result to a file")
    group.add_argument("--append-result", action="store_true", help="append the result to the file")
    group.add_argument("--save-detailed", action="store_true", help="include the timings and texts of every request")
    group.add_argument("--result-dir", default=".", metavar="FOLDER", help="default: the current folder")
    group.add_argument("--result-filename", metavar="FILE", help="default: from the settings and the time")
    group.add_argument("--label", metavar="TEXT", help="first part of the file's name (default: the backend)")
    group.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the result")
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="NAMES", help="metrics in the table")
    group.add_argument("--metric-percentiles", default="99", metavar="X,X,…", help="default: 99")
    group.add_argument("--plot", metavar="FILE", help="draw latency and throughput against the load; .svg or .html")
    group.add_argument("--goodput", nargs="*", default=[], metavar="NAME:MS", help="limits of ttft, tpot, e2el")


def _listed(kind: type[float]) -> Callable[[str], list[float]]:
    def parse(text: str) -> list[float]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None

    return parse


def run(namespace: argparse.Namespace) -> int:
    """Measure; print a table, and the result as one JSON document in the last line. Exit code 1 when a request failed.

    The result contains all four metrics, whichever the table shows. Several loads give one table and result each, then
    a table of all; each has prompts of its own, which no cached prefix of an earlier one helps.
    """
    loads = [(rate, limit) for rate in namespace.request_rate for limit in namespace.max_concurrency]
    if len(namespace.request_rate) > 1 and len(namespace.max_concurrency) > 1:
        raise UsageError("give several values to one of --request-rate and --max-concurrency, not to both")
    for load in loads:
        namespace.request_rate, namespace.max_concurrency = load
        _check(namespace)
    check_plot_name(namespace.plot)
    headers = headers_for(namespace.api_key) | dict(_pair(item, "--header") for item in namespace.header)
    _refuse_broken_headers(headers)
    report = _Report(
        _names(namespace.percentile_metrics, _METRICS, "--percentile-metrics"),
        _percentiles(namespace.metric_percentiles),
        _goodput(namespace.goodput),
        dict(_pair(item, "--metadata") for item in namespace.metadata),
    )
    url = base_url(namespace.base_url or f"http://{namespace.host}:{namespace.port}")
    names = _model_and_tokenizer(namespace, url)

    from sempre.engine.cli.bench.load import Endpoint

    path = namespace.endpoint or _ENDPOINTS[namespace.backend]
    endpoint = Endpoint(url + path, headers, verify=certificate_check(namespace))
    results = []
    first_seed = namespace.seed
    for number, load in enumerate(loads):
        namespace.request_rate, namespace.max_concurrency = load
        namespace.seed = first_seed + number
        results.append(_measured(namespace, endpoint, names, report))
        if namespace.save_result or namespace.append_result:
            _save(namespace, names[0], results[-1], append=namespace.append_result or number > 0)
    if len(results) > 1:
        print(sweep_table(results))
    if namespace.plot is not None:
        write_plot(Path(namespace.plot), {namespace.label or names[0]: results})
    print(json.dumps(results[0] if len(results) == 1 else {"runs": results}))
    return int(any(result["failed"] for result in results))


class _Report(NamedTuple):
    """What the result holds and the table shows."""

    shown: list[str]
    percentiles: list[float]
    goodput: dict[str, float]
    metadata: dict[str, str]


def _measured(
    namespace: argparse.Namespace, endpoint: Endpoint, names: tuple[str, str], report: _Report
) -> dict[str, Any]:
    """Measure one load, and print its table and errors. `names` are those of model and tokenizer."""
    from sempre.engine.cli.bench.serving_metrics import DETAILS, summarize, table

    bodies = _bodies(namespace, namespace.served_model_name or names[0], names[1])
    outcomes, seconds = _send(namespace, endpoint, bodies)
    found = summarize(outcomes, seconds, report.percentiles, report.goodput)
    result = _setting(namespace, *names) | report.metadata | found
    print(table(result, report.shown))
    for error in dict.fromkeys(outcome.error for outcome in outcomes if outcome.error):
        print(f"sempre: error: {plain(str(error))}", file=sys.stderr)
    return result if namespace.save_detailed else {key: result[key] for key in result if key not in DETAILS}


def _check(namespace: argparse.Namespace) -> None:
    """Raise UsageError for numbers out of range and incomplete combinations of flags."""
    if namespace.input_len is not None:
        namespace.random_input_len = namespace.input_len
    if namespace.output_len is not None:
        namespace.random_output_len = namespace.sharegpt_output_len = namespace.output_len
    at_least_one = ("num_prompts", "max_concurrency", "random_input_len", "random_output_len", "sharegpt_output_len")
    least: dict[str, int] = dict.fromkeys(at_least_one, 1) | {"num_warmups": 0, "random_prefix_len": 0, "seed": 0}
    for name, bound in least.items():
        value = getattr(namespace, name)
        if value is not None and value < bound:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}.")
    for name in ("request_rate", "burstiness", "request_timeout"):
        if not getattr(namespace, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(namespace, name)}.")
    if not 0 <= namespace.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio must be in [0, 1), got {namespace.random_range_ratio}.")
    if (namespace.dataset_path is None) != (namespace.dataset_name == "random"):
        raise UsageError("--dataset-path FILE belongs to --dataset-name sharegpt, and is needed with it.")


def _names(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UsageError(f"{flag}: {name!r} is none of {', '.join(known)}.")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles must be numbers from 0 to 100 separated by commas, got {text!r}.")
    return values


def _goodput(items: list[str]) -> dict[str, float]:
    limits = {}
    for item in items:
        name, _, limit = item.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = -1.0
        if name not in _GOODPUT or not limits[name] > 0:
            raise UsageError(f"--goodput: expected {'|'.join(_GOODPUT)}:MILLISECONDS, got {item!r}.")
    return limits


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{flag}: expected KEY=VALUE, got {text!r}.")
    return key.strip(), value.strip()


def _refuse_broken_headers(headers: dict[str, str]) -> None:
    for name, value in headers.items():
        if any(character in name + value for character in "\r\n") or ":" in name:
            raise UsageError(f"--header: {name!r} is not a valid header.")


def _model_and_tokenizer(namespace: argparse.Namespace, url: str) -> tuple[str, str]:
    """Ask the server for missing values; wait for it as long as allowed."""
    if namespace.model is not None and not namespace.ready_check_timeout_sec:
        return namespace.model, namespace.tokenizer or namespace.model
    until = time.monotonic() + namespace.ready_check_timeout_sec
    with connect(namespace, url) as server:
        while True:
            try:
                cards = server.models()
                break
            except ServerError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
    model = namespace.model or cards[0]["id"]
    return model, namespace.tokenizer or namespace.model or cards[0].get("root") or model


def _bodies(namespace: argparse.Namespace, model: str, tokenizer: str) -> list[bytes]:
    from sempre.engine.cli.bench.traffic import as_text, load_tokenizer, random_samples, sharegpt_samples, vocab_size_of

    count = namespace.num_prompts + namespace.num_warmups
    chat = namespace.backend == "openai-chat"
    try:
        if namespace.dataset_name == "sharegpt":
            samples = sharegpt_samples(
                namespace.dataset_path,
                count,
                tokenizer=load_tokenizer(tokenizer),
                output_len=namespace.sharegpt_output_len,
                seed=namespace.seed,
            )
        else:
            samples = random_samples(
                count,
                vocab_size=vocab_size_of(tokenizer),
                input_len=namespace.random_input_len,
                output_len=namespace.random_output_len,
                range_ratio=namespace.random_range_ratio,
                prefix_len=namespace.random_prefix_len,
                seed=namespace.seed,
            )
            samples = as_text(samples, load_tokenizer(tokenizer)) if chat else samples
    except SempreError as error:
        raise UsageError(f"{error} (--tokenizer MODEL names the tokenizer that makes the prompts)") from None
    common = _common_fields(namespace, model)
    bodies = []
    for sample in samples:
        own: dict[str, Any]
        if chat:
            own = {
                "messages": [{"role": "user", "content": sample.prompt}],
                "max_completion_tokens": sample.output_len,
            }
        else:
            own = {"prompt": sample.prompt, "max_tokens": sample.output_len}
        bodies.append(json.dumps({**own, **common}, ensure_ascii=False).encode())
    return bodies


def _common_fields(namespace: argparse.Namespace, model: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    fields |= {name: getattr(namespace, name) for name in _SAMPLING if getattr(namespace, name) is not None}
    ignore_eos = namespace.ignore_eos
    if namespace.dataset_name == "random" if ignore_eos is None else ignore_eos:
        fields["ignore_eos"] = True
    if namespace.logprobs is not None:
        chat = namespace.backend == "openai-chat"
        fields |= {"logprobs": True, "top_logprobs": namespace.logprobs} if chat else {"logprobs": namespace.logprobs}
    fields |= namespace.extra_body
    return fields


def _send(namespace: argparse.Namespace, endpoint: Endpoint, bodies: list[bytes]) -> tuple[list[Any], float]:
    from tqdm import tqdm

    from sempre.engine.cli.bench.load import Planned, drive
    from sempre.engine.cli.bench.traffic import arrival_times

    first, counted = bodies[: namespace.num_warmups], bodies[namespace.num_warmups :]
    due = arrival_times(len(counted), rate=namespace.request_rate, burstiness=namespace.burstiness, seed=namespace.seed)
    plan = [Planned(body, when) for body, when in zip(counted, due, strict=True)]
    disable = namespace.disable_tqdm or not sys.stderr.isatty()

    limits: dict[str, Any] = {"max_concurrency": namespace.max_concurrency, "timeout_s": namespace.request_timeout}

    async def both() -> tuple[list[Any], float]:
        await drive(endpoint, [Planned(body) for body in first], progress=lambda: None, **limits)
        with tqdm(total=len(plan), unit=" requests", disable=disable) as bar:
            return await drive(endpoint, plan, progress=bar.update, **limits)

    return asyncio.run(both())


def _setting(namespace: argparse.Namespace, model: str, tokenizer: str) -> dict[str, Any]:
    rate = namespace.request_rate
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": namespace.backend,
        "backend": namespace.backend,
        "label": namespace.label,
        "model_id": model,
        "tokenizer_id": tokenizer,
        "num_prompts": namespace.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": namespace.burstiness,
        "max_concurrency": namespace.max_concurrency,
    }


def _save(namespace: argparse.Namespace, model: str, result: dict[str, Any], *, append: bool) -> None:
    limit = "" if namespace.max_concurrency is None else f"-concurrency{namespace.max_concurrency}"
    label = namespace.label or namespace.backend
    name = f"{label}-{namespace.request_rate}qps{limit}-{Path(model).name}-{result['date']}.json"
    path = Path(namespace.result_dir) / (namespace.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(
        "a" if append and (namespace.result_filename or namespace.append_result) else "w", encoding="utf-8"
    ) as file:
        file.write(json.dumps(result) + "\n")
