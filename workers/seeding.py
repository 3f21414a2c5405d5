"""Seeds the global generators of a worker process, and digests their states so that workers can be compared.

Sampling reads none of these streams. They are seeded so that anything else that draws from them (a random
initialisation, a library) is the same in every worker and every run.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from sempre.ipc.messages import RngDigests


def seed_everything(seed: int) -> None:
    """Seed `random`, `numpy.random` and `torch` (CPU and accelerators) from one seed in [0, 2**64).

    The mapping is the one a user would write by hand: `random.seed(seed)`, `numpy.random.seed(seed)`,
    `torch.manual_seed(seed)`. NumPy takes 32 bits; a larger seed is passed as its two 32-bit words, low first.
    """
    random.seed(seed)
    np.random.seed(numpy_seed(seed))
    torch.manual_seed(seed)


def numpy_seed(seed: int) -> int | list[int]:
    """What `numpy.random.seed` is given for `seed`."""
    return seed if seed < 2**32 else [seed & 0xFFFFFFFF, seed >> 32]


def rng_digests() -> RngDigests:
    """SHA-256 of the state of each global generator; the accelerator's is empty while it is not in use."""
    return RngDigests(
        python_random=_sha256(repr(random.getstate()).encode()),
        numpy_random=_sha256(_numpy_state()),
        torch_cpu=_sha256(torch.get_rng_state().numpy().tobytes()),
        torch_accelerator=_sha256(torch.cuda.get_rng_state().numpy().tobytes()) if _accelerator_in_use() else "",
    )


def _accelerator_in_use() -> bool:
    # reading the state of an unused accelerator would initialise it
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _numpy_state() -> bytes:
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    words = np.asarray(keys, dtype="<u4").tobytes()
    rest = repr((str(name), int(position), int(has_gauss), float(cached_gaussian)))
    return words + rest.encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
