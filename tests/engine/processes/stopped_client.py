"""A client that stops itself after its first output; the workers are wide_worker's.

It prints the coordinator's process id, waits for a line, and at last prints how many tokens came and a digest of all.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys

from sempre.engine.harness import Cluster, make_request
from sempre.ipc.messages import AddRequests, OutputsReady


def main(num_tokens: int) -> None:
    """Receive everything of one request."""
    with Cluster("tiny", worker_module="wide_worker") as cluster:
        request = make_request([1, 2, 3], max_tokens=num_tokens, logprobs=0)
        print(cluster.coordinator_pid, flush=True)
        sys.stdin.readline()
        cluster.client.send(AddRequests(requests=[request]))
        digest, num_received = hashlib.sha256(), 0
        while num_received < num_tokens:
            event = cluster.client.receive(60)
            assert isinstance(event, OutputsReady), event
            for output in event.outputs:
                assert output.logprobs is not None
                digest.update(repr(output.token_ids).encode() + output.logprobs.logprobs)
                if not num_received:
                    os.kill(os.getpid(), signal.SIGSTOP)
                num_received += len(output.token_ids)
    print(num_received, digest.hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]))
