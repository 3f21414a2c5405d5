"""`python -m sempre.workers`: one worker process."""

from __future__ import annotations

import gc
from time import perf_counter

from sempre.ipc.rank_links import RankLinks
from sempre.workers.gpu.early_start import early_start
from sempre.workers.host_links import read_host_links
from sempre.workers.main import WorkerProtocol, main, parse_options


def make_worker(device: str, index: int, shared_memory: int | None, links: RankLinks | None) -> WorkerProtocol:
    """The worker that runs a model; torch is imported only now, after the hello."""
    began = perf_counter()
    compiler = early_start(device, index)
    # imported modules stay alive: having the collector scan them would only take time
    gc.disable()
    from sempre.workers.worker import Worker

    gc.enable()
    gc.freeze()
    return Worker(compiler, import_seconds=perf_counter() - began, shared_memory=shared_memory, links=links)


if __name__ == "__main__":
    options = parse_options()
    hosts = read_host_links(options)
    links = None if hosts is None else hosts.links
    main(lambda: make_worker(options.device, options.device_index, options.shared_memory, links), hosts=hosts)
