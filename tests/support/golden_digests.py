"""Axis A16: digests of 64 prompts of SmolLM2-135M, greedy and sampled, and the file that they are recorded in.

To record them on the GPU at hand, with the catalogue's smollm2-135m in the cache (`sempre pull smollm2-135m`):

    python tests/support/golden_digests.py tests/gpu/invariance/smollm2_sm_90.json
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, generate, make_request
from sempre.engine.models.cache import model_cache_folder
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.messages import RequestSpec

MODEL = "smollm2-135m"
OUTPUT_TOKENS = 128
OPENINGS = (
    "Once upon a time, in a village by the sea, there lived",
    "The three most important facts about",
    "Write a short letter to a friend about",
    "def solve(n):\n    # This function is about",
    "Q: What would a careful teacher say about",
    "In the year 1847 the newspapers were full of",
    "List five questions that a child might ask about",
    "It was raining again, and nobody wanted to talk about",
)
SUBJECTS = (
    " the moon.", " old bridges.", " a lost dog.", " the price of bread.",
    " numbers that cannot be divided.", " how trees drink.", " a very long journey.", " the colour blue, and why.",
)  # fmt: skip
SETTINGS: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 1024, "multiprocessing": False}
# parts of the fingerprint that digests do not depend on: the axis says so of the card; the rest are no part of a step
FREE = ("device", "driver", "python", "graphs")


def folder() -> Path | None:
    """The converted model in the cache, if it is there."""
    path = model_cache_folder(MODEL)
    return path if (path / "config.json").is_file() else None


def make_requests(path: Path) -> list[RequestSpec]:
    """Each prompt greedy, then each at temperature 1 with its own seed; log-probabilities of the sampled tokens."""
    tokenizer = Tokenizer.from_folder(path)
    prompts = [tokenizer.encode(opening + subject) for opening in OPENINGS for subject in SUBJECTS]
    return [
        make_request(
            prompt, seed=4000 + i, ordinal=i + 64 * kind, max_tokens=OUTPUT_TOKENS, temperature=float(kind), logprobs=2
        )
        for kind in (0, 1)
        for i, prompt in enumerate(prompts)
    ]


def digest(run: Generation) -> str:
    """SHA-256 over the token ids, int32, and the bits of every reported log-probability, all little-endian."""
    state = hashlib.sha256(struct.pack(f"<{len(run.token_ids)}i", *run.token_ids))
    for position in run.logprobs:
        state.update(struct.pack(f"<{len(position.token_ids)}i", *position.token_ids))
        state.update(struct.pack(f"<{len(position.bits)}I", *(bits & 0xFFFFFFFF for bits in position.bits)))
    return state.hexdigest()


def compute(path: Path, **settings: Any) -> tuple[dict[str, str], list[str]]:
    """The fingerprint, and 64 greedy then 64 sampled digests."""
    client = InprocClient.launch(engine_config(**(SETTINGS | {"model": str(path)} | settings)))
    try:
        runs = generate(client, make_requests(path), timeout_s=200.0)
        return dict(client.ready.fingerprint), [digest(run) for run in runs]
    finally:
        client.close()


def main() -> None:
    path = folder()
    if path is None:
        raise SystemExit(f"{MODEL} is not in the cache ({model_cache_folder(MODEL)}): sempre pull {MODEL}")
    fingerprint, digests = compute(path)
    again = compute(path, enforce_eager=True, max_num_seqs=16)[1]
    if again != digests:
        raise SystemExit("not recorded: a run in small batches without graphs gave other digests")
    record = {"model": MODEL, "fingerprint": fingerprint, "greedy": digests[:64], "sampled": digests[64:]}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")
    print(hashlib.sha256("".join(digests).encode()).hexdigest(), json.dumps(fingerprint))


if __name__ == "__main__":
    main()
