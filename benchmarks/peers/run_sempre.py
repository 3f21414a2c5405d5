"""Sempre behind the benchmark's line protocol."""

from __future__ import annotations

from serve import arguments, serve

from sempre.engine import LLM, SamplingParams
from sempre.engine.version import __version__


def main() -> None:
    args = arguments()
    with LLM(args.model, dtype=args.dtype, num_threads=args.threads) as llm:

        def generate(prompts: list[list[int]], output_len: int) -> int:
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        serve(generate, {"sempre": __version__})


if __name__ == "__main__":
    main()
