"""The hosts of an engine: their settings, what a launcher's environment says of them, and their names in messages."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import NamedTuple

from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError

NODE_SETTINGS = ("nnodes", "node_rank", "master_addr")
"""which a launcher gives; a port given beside it is used"""


def check_nodes(config: EngineConfig) -> None:
    """Raise ConfigError for hosts that cannot share the workers."""
    if config.node_rank >= config.nnodes:
        text = f"node_rank={config.node_rank} must be less than nnodes={config.nnodes}."
        raise ConfigError(text, parameter="node_rank", value=config.node_rank)
    if config.nnodes == 1:
        return
    if config.world_size % config.nnodes:
        raise ConfigError(
            f"nnodes={config.nnodes} must divide the {config.world_size} workers (data_parallel_size ×"
            " pipeline_parallel_size × tensor_parallel_size): each host has as many.",
            parameter="nnodes",
            value=config.nnodes,
        )
    if not config.multiprocessing:
        text = f"nnodes={config.nnodes} needs multiprocessing=True: one process holds one worker."
        raise ConfigError(text, parameter="nnodes", value=config.nnodes)
    if config.master_addr in ("0.0.0.0", "::"):
        raise ConfigError(
            f"master_addr: expected the address by which other hosts reach this one, found {config.master_addr}.",
            parameter="master_addr",
            value=config.master_addr,
        )
    if config.node_key_file is None:
        raise ConfigError(
            f"nnodes={config.nnodes} needs node_key_file: a file of mode 0600, the same on all hosts, with the secret"
            " that their links are encrypted with. Host 0 writes it if there is none.",
            parameter="node_key_file",
        )


def ip_address_of(name: str) -> str:
    """The IP address of a host's name. Raises ConfigError."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        text = f"master_addr: expected the address of host 0, found {name!r}: {error.strerror}."
        raise ConfigError(text, parameter="master_addr", value=name) from error


def own_address(towards: str) -> str:
    """The address of this host by which the host with the IP address `towards` can reach it."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # nothing is sent: the system only chooses the route
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


class FoundNodes(NamedTuple):
    """Settings that a launcher's environment gives."""

    settings: dict[str, object]
    source: str
    """of which kind it is; empty: there is none"""


def nodes_of_environment(environment: Mapping[str, str]) -> FoundNodes:
    """Map the variables of a LeaderWorkerSet, or of torchrun and those that set the same, to settings.

    Raises ConfigError for values that are no such, and for several processes on one host.
    """
    if environment.keys() >= {"LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"}:
        settings: dict[str, object] = {
            "nnodes": _number(environment, "LWS_GROUP_SIZE"),
            "node_rank": _number(environment, "LWS_WORKER_INDEX"),
            "master_addr": environment["LWS_LEADER_ADDRESS"],
        }
        return FoundNodes(settings, "the LeaderWorkerSet")
    if not environment.keys() >= {"MASTER_ADDR", "WORLD_SIZE", "RANK"}:
        return FoundNodes({}, "")
    each = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else 1
    if each != 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE: expected 1, found {each}: one command a host starts all of its workers. Run torchrun"
            " with --nproc-per-node 1, or give nnodes and node_rank.",
            parameter="nnodes",
            value=each,
        )
    settings = {
        "nnodes": _number(environment, "WORLD_SIZE"),
        "node_rank": _number(environment, "RANK"),
        "master_addr": environment["MASTER_ADDR"],
    }
    # torchrun itself listens on the port that it names
    if "MASTER_PORT" in environment and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        settings["master_port"] = _number(environment, "MASTER_PORT")
    return FoundNodes(settings, "torchrun's environment")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name}: expected a number, found {text!r}.", parameter="nnodes", value=text)
    return int(text)
