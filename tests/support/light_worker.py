"""The scripted worker with the standard library's generator alone: no torch, no numpy, up in a tenth of a second."""

from __future__ import annotations

import hashlib
import random

from scripted_worker import ScriptedWorker, run

from sempre.ipc.messages import RngDigests


class LightWorker(ScriptedWorker):
    """Digests of the generators that it does not have are empty."""

    def seed(self) -> RngDigests:
        random.seed(self._settings.seed)
        return self.digests()

    def digests(self) -> RngDigests:
        state = repr(random.getstate()).encode()
        return RngDigests(python_random=hashlib.sha256(state).hexdigest(), numpy_random="", torch_cpu="")


if __name__ == "__main__":
    run(LightWorker)
