"""`python -m sempre.workers`: one worker process."""

from __future__ import annotations

from sempre.workers.main import WorkerProtocol, main


def make_worker() -> WorkerProtocol:
    """The worker that runs a model; torch is imported only now, after the hello."""
    from sempre.workers.worker import Worker

    return Worker()


if __name__ == "__main__":
    main(make_worker)
