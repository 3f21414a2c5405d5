"""transformers' generate behind the benchmark's line protocol; equal prompt lengths, so its batch needs no padding."""

from __future__ import annotations

import torch
import transformers
from serve import arguments, serve


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_len: int) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            pad_token_id=0,
        )
        return int(output[:, ids.shape[1] :].numel())

    serve(generate, {"transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
