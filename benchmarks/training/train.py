"""Trains `tiny`, then distils `tiny-draft` from it: `python train.py DATA OUT` (DATA: what tokenizer.py wrote).

Writes to OUT the folders `tiny` and `tiny-draft` (config, bfloat16 weights, tokenizer) and `report.json`. Needs torch,
transformers and safetensors; some minutes on one data-centre GPU. Figures of merit, on the validation split, of the
weights as they are shipped (rounded to bfloat16), computed in float32:

- bits per byte: -log2 p(text) / UTF-8 bytes of the text, in windows of `CONTEXT` tokens;
- agreement: share of positions where both models prefer the same token;
- acceptance: mean of sum_v min(p(v), q(v)), the chance that a draft token sampled at temperature 1 is accepted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
VOCAB_SIZE = 4096
CONTEXT = 2048
SAMPLE_LENGTH = 512  # divides CONTEXT
BETAS, WEIGHT_DECAY, CLIP_NORM, WARMUP_STEPS = (0.9, 0.95), 0.1, 1.0, 100

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
TARGET = COMMON | {
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
DRAFT = COMMON | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 2]}  # 2: <|im_end|>, the end of a turn in the chat format


def build(config: dict[str, Any], device: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**config | {"torch_dtype": "float32"}))
    return torch.nn.Module.to(model, device, torch.float32)


def report_progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def windows(tokens: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `count` windows, int64 [count, CONTEXT], forever; every epoch starts at another offset."""
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator, dtype=torch.int64, device="cpu"))
        rows = (len(tokens) - offset) // CONTEXT
        epoch = tokens[offset : offset + rows * CONTEXT].view(rows, CONTEXT)
        for chosen in torch.split(torch.randperm(rows, generator=generator, dtype=torch.int64, device="cpu"), count):
            if len(chosen) == count:
                yield epoch[chosen.to(tokens.device)].long()


def mixed(corpus: Iterator[Tensor], samples: Iterator[Tensor]) -> Iterator[Tensor]:
    """Alternates two streams of batches."""
    while True:
        yield next(corpus)
        yield next(samples)


def optimise(
    model: LlamaForCausalLM,
    batches: Iterator[Tensor],
    steps: int,
    peak_rate: float,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    after_step: Callable[[int, Tensor], None],
) -> None:
    """AdamW with warm-up and cosine decay to zero; `loss_of(ids, logits)`, `after_step(steps done, loss)`."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=BETAS)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(steps):
        ids = next(batches)
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = loss_of(ids, logits.float())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(step + 1, loss.detach())


def next_token_loss(ids: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), ids[:, 1:].reshape(-1))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: Tensor, size: int) -> float:
    """Cost of all `tokens`, the separators included, over `size` bytes of text."""
    nats = 0.0
    model.train(False)
    for row in torch.split(tokens.long(), CONTEXT):
        ids = F.pad(row, (1, 0))[None]  # <|endoftext|> first, so that each window's first token is counted as well
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / size


def train_target(arguments: argparse.Namespace, train: Tensor, validation: Tensor, size: int) -> LlamaForCausalLM:
    """The target with the weights that did best on a part of the validation split."""
    torch.manual_seed(SEED)
    model = build(TARGET, arguments.device)
    generator = torch.Generator().manual_seed(SEED)
    batches = windows(train, arguments.batch, generator)
    steps = arguments.target_steps
    best: dict[str, Any] = {"bits": math.inf, "weights": {}}

    def after_step(step: int, loss: Tensor) -> None:
        if step % arguments.evaluate_every and step != steps:
            return
        bits = bits_per_byte(model, validation, size)
        model.train()
        report_progress(f"target {step}/{steps} loss {loss:.4f} validation {bits:.4f} bits/byte")
        if bits < best["bits"]:
            best.update(bits=bits, weights=copy.deepcopy(model.state_dict()), step=step)

    optimise(model, batches, steps, arguments.target_rate, next_token_loss, after_step)
    model.load_state_dict(best["weights"])
    print(f"target: kept step {best['step']}")
    return rounded(model)


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with float32 weights that are exactly those of its bfloat16 checkpoint."""
    rounded_model = torch.nn.Module.to(torch.nn.Module.to(model, torch.bfloat16), torch.float32)
    rounded_model.train(False)
    return rounded_model


@torch.no_grad()
def sample(model: Any, count: int, batch: int) -> Tensor:
    """The model's own text at temperature 1, int64 [count * SAMPLE_LENGTH], each sample beginning with
    <|endoftext|>."""
    rows = []
    for start in range(0, count, batch):
        prompt = torch.zeros(min(batch, count - start), 1, dtype=torch.int64, device=model.device)
        with torch.autocast(prompt.device.type, torch.bfloat16):
            rows.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    top_k=0,
                    temperature=1.0,
                    max_length=SAMPLE_LENGTH,
                    min_length=SAMPLE_LENGTH,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            )
    return torch.cat(rows).reshape(-1)


def distil(arguments: argparse.Namespace, target: LlamaForCausalLM, train: Tensor, samples: Tensor) -> LlamaForCausalLM:
    """A draft fitted to the target: KL(target, draft) at temperature 1, half of it on the target's own text."""
    torch.manual_seed(SEED + 1)
    model = build(DRAFT, arguments.device)
    generator = torch.Generator().manual_seed(SEED + 1)
    batches = mixed(windows(train, arguments.batch, generator), windows(samples, arguments.batch, generator))

    def loss_of(ids: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            wanted = target(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum") / ids.numel()

    def after_step(step: int, loss: Tensor) -> None:
        if step % arguments.evaluate_every == 0:
            report_progress(f"draft {step}/{arguments.draft_steps} loss {loss:.4f}")

    optimise(model, batches, arguments.draft_steps, arguments.draft_rate, loss_of, after_step)
    return rounded(model)


@torch.no_grad()
def compare(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: Tensor) -> dict[str, float]:
    """Agreement and acceptance (see the module docstring) over `tokens`."""
    equal = accepted = 0.0
    for row in torch.split(tokens.long(), CONTEXT):
        p, q = (m(input_ids=row[None], use_cache=False).logits[0].float().softmax(-1) for m in (target, draft))
        equal += (p.argmax(-1) == q.argmax(-1)).sum().item()
        accepted += torch.minimum(p, q).sum().item()
    return {"agreement": equal / len(tokens), "acceptance": accepted / len(tokens)}


def write_checkpoint(folder: Path, model: LlamaForCausalLM, config: dict[str, Any], data: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.bfloat16().cpu().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, folder / name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--target-steps", type=int, default=1750)
    parser.add_argument("--target-rate", type=float, default=2e-3)
    parser.add_argument("--draft-steps", type=int, default=6000)
    parser.add_argument("--draft-rate", type=float, default=4e-3)
    parser.add_argument("--samples", type=int, default=4096, help=f"samples of {SAMPLE_LENGTH} tokens for the draft")
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--validation-tokens", type=int, default=10**9, help="use only the first so many")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    data: Path = arguments.data
    train, validation = (
        torch.from_numpy(np.load(data / f"{name}.npy").astype(np.int32)).to(arguments.device)
        for name in ("train", "validation")
    )
    size = json.loads((data / "bytes.json").read_text())["validation"]
    kept = min(arguments.validation_tokens, len(validation))
    validation, size = validation[:kept], size * kept / len(validation)
    target = train_target(arguments, train, validation, size)
    write_checkpoint(arguments.out / "tiny", target, TARGET, data)
    held_out = 64 * SAMPLE_LENGTH if arguments.samples > 64 else SAMPLE_LENGTH
    samples = sample(target, arguments.samples, 2048)
    draft = distil(arguments, target, train, samples[:-held_out])
    write_checkpoint(arguments.out / "tiny-draft", draft, DRAFT, data)
    per_step = arguments.batch * CONTEXT
    report = {
        "parameters": {name: model.num_parameters() for name, model in (("tiny", target), ("tiny-draft", draft))},
        "tokens": {"tiny": arguments.target_steps * per_step, "tiny-draft": arguments.draft_steps * per_step},
        "bits_per_byte": {
            name: bits_per_byte(model, validation, size) for name, model in (("tiny", target), ("tiny-draft", draft))
        },
        "on_validation_text": compare(target, draft, validation),
        "on_target_samples": compare(target, draft, samples[-held_out:]),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "torch": torch.__version__,
    }
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
