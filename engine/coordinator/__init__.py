"""The coordinator: seeds and compares the workers, schedules, tracks KV blocks. Imports no torch.

process.py         the process, `python -m sempre.engine.coordinator`: its sockets and its poll loop
core.py            EngineCore: requests to replicas, steps to workers; the same with multiprocessing off
fair_queue.py      requests that wait for their tenant's turn
progress_watch.py  requests without progress
client_events.py   events for clients
startup.py         handshake with the workers, comparison of their random states
recovery.py        restarts of dead workers
replica.py         a scheduler and the ranks that execute its steps
scheduler_setup.py that scheduler, with the limits that the workers report
rank_comparison.py the results of those ranks, which must be equal
draft_workers.py   the draft workers and their restarts
draft_link.py      one replica's queries to its draft worker
worker_calls.py    calls of the workers' public methods
weights_update.py  new weights for all workers, or none
sleep.py           workers without caches and weights, and requests that wait
kv_event_publisher.py  what the prefix caches hold, over ZeroMQ
metrics_report.py  counters and gauges
"""
