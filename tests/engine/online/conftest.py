"""One real server process for all tests of its clients."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

LIMITS = ["--max-model-len", "512", "--max-num-seqs", "64", "--num-threads", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    command = [sys.executable, "-m", "sempre.engine", "serve", "tiny", "--host", "127.0.0.1", "--port", "0", *LIMITS]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                url = found[1]
                break
        assert url is not None, "the server did not say where it listens"
        try:
            while httpx.get(f"{url}/ready").status_code != 200:
                assert process.poll() is None
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.stderr.close()
            process.wait(60)
