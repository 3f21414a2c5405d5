"""Executors: how commands reach the workers. The only part of the engine that knows where the workers live.

base.py         Executor, the protocol
inproc.py       InprocExecutor: worker objects in this process
local.py        LocalExecutor: worker processes on this machine, over ZeroMQ
worker_peer.py  WorkerPeer: one worker as LocalExecutor sees it
"""
