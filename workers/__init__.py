"""The worker: one process on one device that holds a shard of one replica of the model and executes steps.

`worker` answers the protocol's commands; `runner` runs a step over the `input_batch` and the `kv_cache` with a model
from `models`, a tree of `layers` whose matrices have a format of `quantization`; `loading` reads it; `self_test` checks
the guarantee at start-up; `fingerprint` names what the bits depend on.
"""
