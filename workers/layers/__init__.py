"""What models are made of: a `Module` names its tensors in the checkpoint, loads them, and computes rows of a step.

`module` is the tree itself; `linear`, `norm`, `embedding`, `attention` and `mlp` are its leaves and small branches.
Nothing here knows a model family.
"""
