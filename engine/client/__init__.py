"""The user process's end of an engine: commands out, events in.

interface.py       EngineClient, AsyncEngineClient, and `launch`, `launch_async`, which choose one of the following
process.py         over ZeroMQ to a coordinator process
inproc.py          coordinator's core and worker in this process (multiprocessing off)
asynchronous.py    the same two for asyncio
engine_process.py  start, watch and end of the coordinator process
ledger.py          what a coordinator owes: enough to have another one go on
worker_watch.py    whether the workers of a coordinator that died are gone
vigil.py           silence of the coordinator
"""
