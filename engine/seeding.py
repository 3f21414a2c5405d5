"""Seeds of the engine and of requests: validation, derivation, and the comparison of the workers' generators."""

from __future__ import annotations

import hashlib
import operator
import struct
from collections.abc import Sequence

import msgspec

from sempre.ipc.errors import ConfigError, SeedMismatch
from sempre.ipc.messages import RngDigests, SamplingSpec

SEED_LIMIT = 2**64
_TAG = b"sempre request seed\0"
_DIGEST_TAG = b"sempre request digest 1\0"


def validate_seed(seed: object) -> int:
    """`seed` as an int in [0, 2**64); integer types of other libraries are allowed. Raises ConfigError."""
    if seed is None:
        raise _refuse(
            seed,
            "seed cannot be None: the seed of an engine cannot be un-specified, because all workers (every rank, "
            "target and draft) must sample alike; leave it out for 0, or pass an int",
        )
    if isinstance(seed, bool):
        raise _refuse(seed, f"seed must be an int, got the bool {seed}; write {int(seed)} if that is meant")
    try:
        value = operator.index(seed)  # type: ignore[arg-type]  # raises for a non-integer
    except TypeError:
        raise _refuse(seed, f"seed must be an int, got {seed!r} of type {type(seed).__name__}") from None
    if not 0 <= value < SEED_LIMIT:
        raise _refuse(seed, f"seed must be in [0, 2**64), got {value}")
    return value


def distribution_digest(spec: SamplingSpec) -> bytes:
    """Return SHA-256 (32 bytes) of all parameters that change the sampling distribution, in canonical form.

    Numbers have the precision that sampling uses; unordered values are sorted and those without effect left out.
    Lengths, stop conditions and reports are not in it: a longer output begins like a shorter one.
    """
    canonical = [
        *_as_float32(spec.temperature, spec.min_p, spec.presence_penalty, spec.frequency_penalty),
        *_as_float32(spec.repetition_penalty),
        spec.top_k,
        spec.top_p,
        [[token_id, *_as_float32(bias)] for token_id, bias in sorted(spec.logit_bias.items()) if bias != 0.0],
        None if spec.allowed_token_ids is None else sorted(set(spec.allowed_token_ids)),
        sorted(set(map(tuple, spec.bad_words_token_ids))),
        spec.grammar,
        None if spec.reasoning is None else spec.reasoning.grammar,
    ]
    return hashlib.sha256(_DIGEST_TAG + msgspec.msgpack.encode(canonical)).digest()


def request_digest(distribution: bytes, prompt_token_ids: Sequence[int], adapter: str | None = None) -> bytes:
    """Return the digest (32 bytes) of distribution, prompt and adapter (the digest of its files, hex) under which
    requests without a seed are counted."""
    own = b"" if adapter is None else bytes.fromhex(adapter)
    return hashlib.sha256(distribution + own + msgspec.msgpack.encode(prompt_token_ids)).digest()


def derive_request_seed(engine_seed: int, digest: bytes, count: int) -> int:
    """The seed of a request without one: the first 8 bytes, little-endian, of
    SHA-256("sempre request seed\\0" + engine seed (8 bytes, little-endian) + digest (32) + count (8, little-endian)),
    where `count` is the number of requests without a seed and with the same digest that this engine accepted before."""
    packed = _TAG + engine_seed.to_bytes(8, "little") + digest + count.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(packed).digest()[:8], "little")


def child_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request with n > 1: (seed + index) mod 2**64, for a negative `seed` too."""
    return (seed + index) % SEED_LIMIT


def reported_seed(seed: int, index: int) -> int:
    """`child_seed` as reported to the user: a negative seed as given, but never -1, which means no seed."""
    return seed + index if seed + index < -1 else child_seed(seed, index)


def compare_digests(digests: Sequence[RngDigests], when: str, names: Sequence[str] | None = None) -> None:
    """Raise SeedMismatch for the first rank (the index) whose generators differ from those of rank 0.

    `names` are the names of the ranks, by default `rank 0`, `rank 1`, …
    """
    called = names or [f"rank {rank}" for rank in range(len(digests))]
    for rank, candidate in enumerate(digests):
        _compare(rank, digests[0], candidate, (called[rank], called[0]), when)


def compare_with_former(rank: int, name: str, former: RngDigests, successor: RngDigests, when: str) -> None:
    """Raise SeedMismatch if a restarted worker's generators differ from those of the worker it replaces."""
    _compare(rank, former, successor, (name, "the worker that it replaces"), when)


def _compare(rank: int, one: RngDigests, other: RngDigests, names: tuple[str, str], when: str) -> None:
    expected, found = msgspec.structs.asdict(one), msgspec.structs.asdict(other)
    different = [name for name in expected if expected[name] != found[name]]
    if different:
        wanted, got = ({name: states[name] for name in different} for states in (expected, found))
        raise SeedMismatch(
            f"{names[0]} is seeded differently from {names[1]} {when}: {', '.join(different)}: "
            f"expected {_text(wanted)}, found {_text(got)}; every worker must run the same library versions",
            rank=rank,
            expected=_text(wanted),
            found=_text(got),
        )


def _as_float32(*values: float) -> list[float]:
    """The values rounded to float32; a negative zero becomes zero."""
    form = f"<{len(values)}f"
    return [value + 0.0 for value in struct.unpack(form, struct.pack(form, *values))]


def _text(states: dict[str, str]) -> str:
    return ", ".join(f"{name}={digest or 'none'}" for name, digest in states.items())


def _refuse(seed: object, text: str) -> ConfigError:
    return ConfigError(text, parameter="seed", value=seed)
