"""The coordinator: seeds and compares the workers, schedules, keeps account of KV blocks. Imports no torch.

process.py         the process, `python -m sempre.engine.coordinator`: its sockets and its poll loop
core.py            EngineCore: requests to replicas, steps to workers; the same with multiprocessing off;
                   ProgressWatch: requests that do not move
startup.py         handshake with the workers, comparison of their random states
recovery.py        restarts of workers that died
replica.py         a scheduler and the ranks that execute its steps
draft_workers.py   the draft workers, their death and restart
draft_link.py      what one replica asks of its draft worker
worker_calls.py    calls of the workers' public methods
metrics_report.py  counters and gauges
"""
