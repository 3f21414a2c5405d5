"""The coordinator: seeds and compares the workers, schedules, keeps account of KV blocks. Imports no torch.

process.py         the process, `python -m sempre.engine.coordinator`: its sockets and its poll loop
core.py            EngineCore: requests to replicas, steps to workers; the same with multiprocessing off
startup.py         handshake with the workers, comparison of their random states
recovery.py        restarts of workers that died
replica.py         a scheduler and the ranks that execute its steps
progress.py        requests that do not move
worker_calls.py    calls of the workers' public methods
metrics_report.py  counters and gauges
"""
