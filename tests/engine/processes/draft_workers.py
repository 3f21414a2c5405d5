"""Workers of which those of role draft go wrong in one way, started as a module; SEMPRE_TEST_ODDITY names the way."""

from __future__ import annotations

import os

import msgspec

from sempre.ipc.messages import LoadModel, ModelLoaded
from sempre.workers.main import main
from sempre.workers.worker import Worker

ODDITY = os.environ["SEMPRE_TEST_ODDITY"]


class OddDraftWorker(Worker):
    def load_model(self, command: LoadModel) -> ModelLoaded:
        config = command.config
        if config.role == "draft" and ODDITY == "other-seed":
            config = msgspec.structs.replace(config, seed=config.seed + 1)
        return super().load_model(LoadModel(config=config))


if __name__ == "__main__":
    main(OddDraftWorker)
