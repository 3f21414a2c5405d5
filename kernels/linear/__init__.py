"""Matrix product of activations with a weight: out[t, n] = sum over k of x[t, k] * weight[n, k] (+ bias[n]).

Contract: every output element is one chain of float32 fused multiply-adds over k ascending, starting at 0; the bias
is added last. So a row's result depends on nothing but that row and the weight: not on the number of rows, its place
among them, the tile that computed it, or the number of threads. Weights stored in 16 bit are widened exactly.
"""

from sempre.kernels.linear.control import ControlLinear, control_linear, control_pack
from sempre.kernels.linear.cpu import PackedLinear, linear, pack_linear

__all__ = ["ControlLinear", "PackedLinear", "control_linear", "control_pack", "linear", "pack_linear"]
