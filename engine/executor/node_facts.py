"""What a host tells of itself before anything is started on it, and whether it fits the first one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import time

from sempre.engine.version import __version__
from sempre.ipc.channel import check_version
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import StartupError
from sempre.ipc.messages import PROTOCOL_VERSION, NodeFacts, NodeHello

_LIBRARIES = ("torch", "numpy", "numba", "llvmlite", "msgspec", "pyzmq")


def own_facts(address: str) -> NodeFacts:
    """Of this host, which others reach at `address`."""
    versions = {"sempre": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        num_cores=len(os.sched_getaffinity(0)),
        versions=versions,
        clock_s=time.time(),
    )


def own_hello(config: EngineConfig, address: str) -> NodeHello:
    """Of this host's agent."""
    speculative = config.speculative_config
    return NodeHello(
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        node_rank=config.node_rank,
        nnodes=config.nnodes,
        world_size=config.world_size,
        facts=own_facts(address),
        model_path=config.model_path,
        draft_model_path=None if speculative is None else speculative.model_path,
    )


def check_node(hello: NodeHello, config: EngineConfig, head: NodeFacts) -> None:
    """Raise VersionMismatch, or StartupError for a host that cannot take part."""
    check_version(hello)
    name = f"node {hello.node_rank} ({hello.facts.host}, {hello.facts.address})"
    settings = (("nnodes", config.nnodes, hello.nnodes), ("workers", config.world_size, hello.world_size))
    for what, expected, found in settings:
        if expected != found:
            text = f"{name}: {what}: expected {expected}, found {found}; give all hosts the same settings"
            raise StartupError(text, cause=what)
    if hello.node_rank >= config.nnodes:
        raise StartupError(f"{name}: expected a number below nnodes={config.nnodes}", cause="node_rank")
    for library, expected_version in head.versions.items():
        version = hello.facts.versions.get(library, "none")
        if version != expected_version:
            text = f"{name}: {library}: expected {expected_version}, found {version}; all hosts need the same versions"
            raise StartupError(text, cause=library)


def clock_offset_s(facts: NodeFacts) -> float:
    """By how much the clock of a host that has just sent these is ahead of this one's."""
    return facts.clock_s - time.time()


def describe_node(number: int, config: EngineConfig, facts: NodeFacts, offset_s: float | None = None) -> str:
    """One line for the user; `offset_s`: what is known of its clock."""
    first = number * config.ranks_per_node
    last = first + config.ranks_per_node - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    versions = ", ".join(f"{name} {facts.versions[name]}" for name in ("python", "torch"))
    clock = "" if offset_s is None else f", clock {offset_s:+.2f} s"
    return (
        f"node {number} of {config.nnodes}: {facts.host} ({facts.address}), {ranks}, {facts.num_cores} cores,"
        f" {versions}{clock}"
    )
