"""Training a model whose log-probabilities are, bit for bit, those that the engine reports.

    trainer = Trainer(llm.model_folder)
    logprobs = trainer(input_ids, attention_mask)        # float32 [B, T], with gradients
    loss(logprobs).backward(); optimizer.step()
    llm.update_weights(trainer.named_tensors())

The forward pass is the tree of `workers.models`, computed by the engine's kernels on one device. The backward pass is
one `torch.autograd.Function` per operation: `formulas` has the derivatives, `operations` and `attention` pair them with
the kernels, `tree` puts them into a model's tree.
"""

from sempre.workers.trainer.trainer import Trainer

__all__ = ["Trainer"]
