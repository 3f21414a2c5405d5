"""Executors: how commands reach the workers. Only this part of the engine knows where the workers run.

base.py         Executor, the protocol
inproc.py       InprocExecutor: worker objects in this process
local.py        LocalExecutor: worker processes on this machine, over ZeroMQ
known_models.py what the workers can load
worker_peer.py  WorkerPeer: LocalExecutor's view of one worker
"""
