"""Coordinator ⇄ node: the agent on another host, which starts workers there."""

from __future__ import annotations

from sempre.ipc.key_pairs import WorkerKeys
from sempre.ipc.messages.common import Data, ErrorInfo, Heartbeat, Message, NonNegative, Positive, Refused


class NodeFacts(Data, frozen=True, kw_only=True):
    """What a node tells of itself."""

    host: str
    """its name"""
    address: str
    """by which other nodes reach it"""
    num_cores: Positive
    versions: dict[str, str] = {}
    clock_s: float = 0.0
    """seconds since the epoch, which are told to the user alone"""


class NodeHello(Message, frozen=True, kw_only=True):
    """First event of a node. The paths are those of the models on its disks."""

    protocol_version: int
    pid: int
    node_rank: Positive
    nnodes: Positive
    world_size: Positive
    facts: NodeFacts
    model_path: str
    draft_model_path: str | None = None


class StartWorker(Message, frozen=True, kw_only=True):
    """Start a worker process; `start` counts its rank's starts. Answered by WorkerStarted, later by WorkerExited."""

    rank: NonNegative
    start: NonNegative
    name: str
    device: str
    device_index: NonNegative
    num_threads: Positive
    heartbeat_interval_s: float
    max_message_bytes: Positive
    hub_address: str
    """of the coordinator, for the worker"""
    keys: WorkerKeys | None = None
    """None: no link of the worker leaves its host"""
    shares_memory: bool = False
    """with other workers of its replica on its host"""


class KillWorker(Message, frozen=True, kw_only=True):
    """End that start of a rank at once, if it still runs."""

    rank: NonNegative
    start: NonNegative


class EndNode(Message, frozen=True, kw_only=True):
    """End all workers, then the agent: with an error if the engine has failed."""

    error: ErrorInfo | None = None


NodeCommand = StartWorker | KillWorker | EndNode | Heartbeat | Refused


class WorkerStarted(Message, frozen=True, kw_only=True):
    """The process exists."""

    rank: NonNegative
    start: NonNegative
    pid: int


class WorkerExited(Message, frozen=True, kw_only=True):
    """The process is gone, or could not be started."""

    rank: NonNegative
    start: NonNegative
    exitcode: int | None = None
    """None: it could not be started"""
    ending: str = ""
    """in words"""
    log_tail: str = ""


NodeEvent = NodeHello | WorkerStarted | WorkerExited | Heartbeat | Refused
